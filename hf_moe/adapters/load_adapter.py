"""Load a PEFT adapter that somebody else saved: checked before memory is taken, and after it is in place.

PEFT warns of missing and surplus tensors and goes on, accepts NaN, reads pickles, and allocates what the config says
before it looks at the weights. Here each is an error.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe.adapters.frozen_router import HASH_FILE, verify_adapter_base
from hf_moe.models.checkpoint_files import CheckpointError, StoredTensor, read_headers

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# what PEFT reads from a repository
_FILES = (WEIGHTS, CONFIG, HASH_FILE, "adapter_model.bin")
# config fields that set the size of new tensors
_SIZES = ("r", "rank_pattern", "adapter_width", "num_adapter_experts")
_FACTORS = ("lora_alpha", "alpha_pattern")
_LONGEST_CONFIG = 4 * 2**20


class AdapterError(ValueError):
    """An adapter that would not give what was saved."""


def load_adapter(
    model: PreTrainedModel,
    adapter: str | Path,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    strict_router: bool = False,
    accelerate: bool = True,
) -> "PeftModel":
    """`PeftModel.from_pretrained` for adapters that are not trusted.

    Before: the config is JSON of sane numbers, the weights are one whole safetensors file (no pickle is ever read)
    that explains every size in the config. After: the adapter holds exactly the file's tensors, finite.

    Args:
        model: The base.
        adapter: A folder, or a name on the Hub.
        adapter_name: Letters, digits, `_` and `-`, at most 64.
        strict_router: Refuse, instead of warn, if the adapter was trained on other routers (`verify_adapter_base`).
        accelerate: Run LoRA on fused experts through the factors (`accelerate_adapters`).

    Raises:
        AdapterError: If the adapter is damaged, hostile, or of another model.
        RouterNotFrozenError: With `strict_router`.
        ImportError: Without peft.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ImportError('adapters need peft. Install it with: pip install "hf-moe[recipes]"') from error
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", adapter_name):
        raise AdapterError(f"an adapter's name is 1 to 64 letters, digits, '_' and '-', got {adapter_name!r:.80}.")
    folder = _local(adapter)
    stored = check_adapter(folder)
    try:
        loaded = PeftModel.from_pretrained(model, folder, adapter_name=adapter_name, is_trainable=is_trainable)
    except (TypeError, RuntimeError, KeyError) as error:
        raise AdapterError(f"the adapter in {str(folder)!r} does not fit {type(model).__name__}: {error}") from error
    state = get_peft_model_state_dict(loaded, adapter_name=adapter_name, save_embedding_layers=False)
    _check_tensors(folder, stored, state)
    if (folder / HASH_FILE).is_file() and model.device.type != "meta":
        verify_adapter_base(folder, loaded, strict=strict_router)
    if accelerate and _has_expert_lora(loaded):
        from hf_moe.adapters.expert_lora import accelerate_adapters

        accelerate_adapters(loaded)
    return loaded


def check_adapter(folder: Path) -> list[StoredTensor]:
    """Check an adapter's files without a model; the weights' names and shapes.

    Raises:
        AdapterError: Naming the file, the value and the rule.
    """
    config = _read_config(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which can run code)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise AdapterError(f"{str(folder)!r} holds no {WEIGHTS}{pickled}. Save the adapter with save_pretrained.")
    try:
        stored = read_headers([str(folder / WEIGHTS)])
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    if not stored:
        raise AdapterError(f"{str(folder / WEIGHTS)!r} holds no tensor. Save the adapter again.")
    largest = max((size for tensor in stored for size in tensor.shape), default=0)
    for field in _SIZES:
        for value in _values(config.get(field)):
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
                raise AdapterError(
                    f"{field} in {str(folder / CONFIG)!r} must be an integer from 1 to {largest} (the largest size in "
                    f"the adapter's tensors), got {value!r:.80}."
                )
    for field in _FACTORS:
        for value in _values(config.get(field)):
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise AdapterError(f"{field} in {str(folder / CONFIG)!r} must be a finite number, got {value!r:.80}.")
    return stored


def _local(adapter: str | Path) -> Path:
    if Path(adapter).exists():
        return Path(adapter)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(adapter), allow_patterns=list(_FILES)))
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise AdapterError(f"there is no adapter {str(adapter)!r:.200}, neither a folder nor on the Hub.") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        below = sorted(str(found.parent) for found in folder.glob(f"*/{CONFIG}"))
        hint = f", such as {below[-1]!r}" if below else ""
        raise AdapterError(f"{str(folder)!r} has no {CONFIG}. Name the folder of an adapter{hint}.")
    if path.stat().st_size > _LONGEST_CONFIG:
        raise AdapterError(f"{str(path)!r} has {path.stat().st_size:,} bytes, at most {_LONGEST_CONFIG:,} are read.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{str(path)!r} is not valid JSON ({error}). Save the adapter again.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{str(path)!r} must be a mapping with a peft_type. Save the adapter with save_pretrained.")
    return config


def _values(field: Any) -> list[Any]:
    """The values of a field that is a number or a mapping of patterns to numbers."""
    if field is None:
        return []
    return list(field.values()) if isinstance(field, Mapping) else [field]


def _check_tensors(folder: Path, stored: list[StoredTensor], state: Mapping[str, Tensor]) -> None:
    """What is in place must be what the file holds."""
    from safetensors import safe_open

    names = {tensor.name for tensor in stored}
    file = str(folder / WEIGHTS)
    if missing := sorted(set(state) - names):
        raise AdapterError(
            f"{file!r} lacks {missing[0]!r} ({len(missing)} tensors in all), which would be new weights."
        )
    if surplus := sorted(names - set(state)):
        raise AdapterError(f"{file!r} holds {surplus[0]!r} ({len(surplus)} in all), which the model has no place for.")
    with safe_open(file, framework="pt") as opened:
        for name in sorted(names):
            value = opened.get_tensor(name)
            if not bool(torch.isfinite(value).all()):
                raise AdapterError(f"{name!r} in {file!r} holds NaN or infinite values. Load an earlier checkpoint.")
            if not _is_same(state[name].detach(), value):
                raise AdapterError(
                    f"{name!r} in {file!r} was not loaded as it is. Report this with the adapter's config."
                )


def _is_same(loaded: Tensor, stored: Tensor) -> bool:
    if loaded.is_meta:
        return loaded.shape == stored.shape
    return torch.equal(loaded.cpu(), stored.to(loaded.dtype))


def _has_expert_lora(model: torch.nn.Module) -> bool:
    from peft.tuners.lora.layer import ParamWrapper

    return any(isinstance(module, ParamWrapper) for module in model.modules())
