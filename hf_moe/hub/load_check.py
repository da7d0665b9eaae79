"""Load what is about to be pushed, as anybody will who downloads it."""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from hf_moe.adapters.frozen_router import HASH_FILE, RouterNotFrozenError, verify_adapter_base
from hf_moe.adapters.load_adapter import load_adapter
from hf_moe.hub.errors import LoadsBackError, PushRefusedError
from hf_moe.hub.upload_files import ADAPTER_CONFIG, CONFIG, Upload, read_json
from hf_moe.io.error_text import one_line
from hf_moe.loading.auto_classes import named_auto_class
from hf_moe.loading.config_files import load_config
from hf_moe.loading.errors import MISFITS
from hf_moe.models.checkpoint_files import INDEX_FILE, SINGLE_FILE, check_folder, check_index, read_headers, read_index
from hf_moe.models.checkpoint_layout import is_finite

_HEADROOM = 1.5  # of the weights' bytes: loading and a forward pass of a few tokens
_TOKENS = 8
_CACHE_ERROR = 0.25  # of what the context makes: a cache that is forgotten is off by all of it
_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")
_SHOWN = 600  # characters of another library's error
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_NOT_LOADED = (*MISFITS, OSError, ValueError, ImportError, MemoryError, SafetensorError)


@dataclass(frozen=True)
class LoadCheck:
    """Result of a check.

    Attributes:
        summary: One sentence.
        ran: Whether a forward pass ran; False where the weights do not fit into memory.
    """

    summary: str
    ran: bool


def check_sent(
    folder: Path, uploads: Sequence[Upload], base: Path | None = None, *, trust_remote_code: bool = False
) -> LoadCheck:
    """`check_loads` of the files that are sent, and of nothing else that lies in `folder` or beside it."""
    with _as_downloaded(uploads, folder.resolve().name) as alone:
        try:
            return check_loads(alone, base, trust_remote_code=trust_remote_code)
        except PushRefusedError as error:
            raise type(error)(str(error).replace(str(alone), str(folder))) from error.__cause__


@contextmanager
def _as_downloaded(uploads: Sequence[Upload], name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, name)
        for upload in uploads:
            path = folder / upload.path
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(upload.source, bytes):
                path.write_bytes(upload.source)
            else:
                path.symlink_to(upload.source.resolve())
        yield folder


def check_loads(folder: Path, base: Path | None = None, *, trust_remote_code: bool = False) -> LoadCheck:
    """Load the model in `folder`, or the adapter there on the model in `base`, on the CPU, and run a forward pass.

    Every weight must be finite, also of experts that the few tokens do not reach. A tokenizer is loaded as well. A
    model that generates decodes two tokens, the second from its cache.

    Weights that do not fit into free memory are compared by name and shape alone (meta device).

    Raises:
        LoadsBackError: If anything is missing, does not fit, or gives numbers that are not finite.
        PushRefusedError: If a JSON file is none.
    """
    for path in sorted(folder.glob("*.json")):
        read_json(path)  # transformers takes its defaults for a generation_config.json that is damaged
    try:
        if any((folder / name).is_file() for name in _TOKENIZERS):
            transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        if not (folder / ADAPTER_CONFIG).is_file():
            return _check_model(folder, trust_remote_code)
        if base is None:
            raise LoadsBackError("an adapter is checked on its base; name it.")
        return _check_adapter(folder, base, trust_remote_code)
    except LoadsBackError:
        raise
    except _NOT_LOADED as error:
        raise LoadsBackError(f"{str(folder)!r} does not load back: {one_line(error, _SHOWN)}") from error


def _check_model(folder: Path, trust_remote_code: bool) -> LoadCheck:
    _check_files(folder)
    fits = _fits(folder)
    model, info = _load_model(folder, trust_remote_code, _dtype(folder), fits)
    for key in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(key, ()))):
            raise LoadsBackError(
                f"{str(folder)!r} does not load back: {key.replace('_', ' ')}: {names[0]} ({len(names)} in all); they "
                "would be newly initialised. Save the model again."
            )
    summary = f"loads as {type(model).__name__}"
    if unused := sorted(map(str, info.get("unexpected_keys", ()))):
        summary += f" without {unused[0]} ({len(unused)} tensors in all), which it has no place for"
    if fits:
        _refuse_not_finite(folder, model)
    return _check_numbers(folder, model, fits, summary)


def _check_files(folder: Path) -> None:
    """Raise CheckpointError for damage that transformers overlooks, or reports without the name of the file."""
    check_folder(folder, variant=None)
    index = folder / INDEX_FILE
    weight_map = read_index(index) if index.is_file() else {}
    names = sorted(set(weight_map.values())) or [SINGLE_FILE]
    stored = read_headers(str(folder / name) for name in names if weight_map or (folder / name).is_file())
    if weight_map:
        check_index(weight_map, stored)
    if read_json(folder / CONFIG).get("quantization_config") is not None:
        return
    for tensor in stored:
        if ".experts." in tensor.name and not tensor.floating:
            raise LoadsBackError(
                f"{tensor.where} has dtype {tensor.dtype}, and {CONFIG} names no quantization: transformers would "
                "round such weights. Save the model again."
            )


def _refuse_not_finite(folder: Path, model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        # float8 knows no minimum
        if value.is_floating_point() and value.element_size() > 1 and not is_finite(value):
            raise LoadsBackError(f"{name} in {str(folder)!r} holds NaN or infinity. Nothing of it is pushed.")


def _check_adapter(folder: Path, base: Path, trust_remote_code: bool) -> LoadCheck:
    fits = _fits(base)
    model, _ = _load_model(base, trust_remote_code, _dtype(folder), fits)
    name = type(model).__name__
    model = load_adapter(model, folder, accelerate=False)
    return _check_numbers(folder, model, fits, f"loads on {name}")


def _check_numbers(folder: Path, model: nn.Module, fits: bool, summary: str) -> LoadCheck:
    if not fits:
        summary += " by names and shapes; the weights do not fit into memory for a forward pass"
        return LoadCheck(summary, False)
    if (folder / HASH_FILE).is_file():
        try:
            verify_adapter_base(folder, model, strict=True)
        except RouterNotFrozenError as error:
            raise LoadsBackError(f"{str(folder)!r} is not pushed: {error}") from error
        summary += f", routers as in {HASH_FILE}"
    _run(model, folder)
    decodes = ", decoding with a cache is right" if _decodes(model) else ""
    return LoadCheck(f"{summary}, a forward pass is finite{decodes}", True)


def _load_model(
    folder: Path, trust_remote_code: bool, dtype: torch.dtype | str, fits: bool
) -> tuple[Any, Mapping[str, Any]]:
    config = load_config(folder, trust_remote_code=trust_remote_code)
    return _auto_class(config).from_pretrained(
        folder,
        dtype=dtype,
        device_map="cpu" if fits else "meta",
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
    )


def _dtype(folder: Path) -> torch.dtype | str:
    """The dtype in which the routers were recorded: in another one the base may be rounded differently."""
    named = read_json(folder / HASH_FILE).get("dtype") if (folder / HASH_FILE).is_file() else None
    return getattr(torch, named) if named in _DTYPES else "auto"


def _auto_class(config: Any) -> Any:
    """The auto class whose model for this config is the one that it names.

    Raises:
        LoadsBackError: If there is none.
    """
    found = named_auto_class(config)
    if found is None:
        wanted = next(iter(config.architectures or []), None)
        raise LoadsBackError(
            f"architectures in config.json says {wanted!r}, which no Auto class knows for {config.model_type!r}. Save "
            "the model with save_pretrained of its own class."
        )
    return found


@torch.no_grad()
def _run(model: Any, folder: Path) -> None:
    model.eval()
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(_TOKENS)[None] * 7 % vocabulary
    outputs = model(input_ids=ids)
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise LoadsBackError(f"{str(folder)!r} gives NaN or infinity in {name}. Nothing of it is pushed.")
    if _decodes(model):
        _refuse_wrong_cache(model, folder, ids)


def _decodes(model: Any) -> bool:
    return model.can_generate() and not model.config.is_encoder_decoder


def _refuse_wrong_cache(model: Any, folder: Path, ids: torch.Tensor) -> None:
    """Decode two tokens: the second, from the cache, must have the logits that it has without one.

    Rounding changes a few routings, so logits of a right cache differ as well, in 16 bits by some percent. What a
    wrong one loses is context: the unit is how far the logits move when the last token stands alone.
    """
    decoding = transformers.GenerationConfig(
        max_new_tokens=2, min_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    decoding.pad_token_id = 0
    decoded = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=decoding)
    whole = decoded.sequences[:, :-1]
    cached = decoded.logits[1].double()
    expected, alone = (model(input_ids=given).logits[:, -1].double() for given in (whole, whole[:, -1:]))
    error, context = float((cached - expected).norm()), float((alone - expected).norm())
    rounding = torch.finfo(model.dtype).eps * float(expected.norm())
    if not error <= _CACHE_ERROR * context + rounding:
        raise LoadsBackError(
            f"{str(folder)!r} decodes wrongly: with its cache, the logits of the second token are {error:.2g} off "
            f"those without a cache ({context:.2g} is what all of the context makes). Its code may not fit "
            f"transformers {transformers.__version__}."
        )


def _fits(folder: Path) -> bool:
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return available is None or weights * _HEADROOM < int(available[1]) * 1024
