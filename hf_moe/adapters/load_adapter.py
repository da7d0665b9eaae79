"""Load a PEFT adapter that somebody else saved: checked before memory is taken, and after it is in place.

PEFT warns of missing and surplus tensors and goes on, accepts NaN, reads pickles, and allocates what the config says
before it looks at the weights. Here each is an error.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe.adapters.frozen_router import HASH_FILE, verify_adapter_base
from hf_moe.models.checkpoint_files import CheckpointError, StoredTensor, read_headers
from hf_moe.models.loading import ModelError, find_model

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# what PEFT reads from a repository
_FILES = (WEIGHTS, CONFIG, HASH_FILE)
# config fields that set the size of new tensors
_SIZES = (
    "r",
    "rank_pattern",
    "init_r",
    "target_r",
    "num_virtual_tokens",
    "adapter_width",
    "num_adapter_experts",
)
# config fields that are not data: what they do
_REFUSED = {
    "megatron_config": "imports the module that megatron_core names, and no config selects code",
    "layer_replication": "builds a deeper model. Merge it and save the model",
}
_FACTORS = ("lora_alpha", "alpha_pattern")
_LONGEST_CONFIG = 4 * 2**20
_LARGEST_INTEGER = 2**63


class AdapterError(ValueError):
    """An adapter that would not give what was saved."""


def load_adapter(
    model: PreTrainedModel,
    adapter: str | Path,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    is_trainable: bool = False,
    strict_router: bool = False,
    accelerate: bool = True,
) -> "PeftModel":
    """`PeftModel.from_pretrained` for adapters that are not trusted.

    Before: the config is JSON of sane numbers, the weights are one whole safetensors file (no pickle is ever read)
    that explains every size in the config. After: the adapter holds exactly the file's tensors, finite. What
    `export_adapter` wrote is folded into the form of fused experts first.

    Args:
        model: The base.
        adapter: A folder, or a name on the Hub.
        adapter_name: Letters, digits, `_` and `-`, at most 64.
        revision: Commit, tag or branch of an adapter on the Hub; of others' adapters pin the commit.
        strict_router: Refuse, instead of warn, if the adapter was trained on other routers (`verify_adapter_base`).
        accelerate: Run LoRA on fused experts through the factors (`accelerate_adapters`).

    Raises:
        AdapterError: If the adapter is damaged, hostile, or of another model. `model` may hold parts of it then: load
            it anew.
        RouterNotFrozenError: With `strict_router`.
        ImportError: Without peft.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ImportError('adapters need peft. Install it with: pip install "hf-moe[recipes]"') from error
    from hf_moe.adapters.per_expert import PerExpertError, fused, is_per_expert

    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", adapter_name):
        raise AdapterError(f"an adapter's name is 1 to 64 letters, digits, '_' and '-', got {adapter_name!r:.80}.")
    folder = _local(adapter, revision)
    stored = check_adapter(folder)
    if is_per_expert(folder):
        try:
            with fused(folder, model) as folded:
                return load_adapter(
                    model,
                    folded,
                    adapter_name,
                    is_trainable=is_trainable,
                    strict_router=strict_router,
                    accelerate=accelerate,
                )
        except PerExpertError as error:
            raise AdapterError(f"the adapter in {str(folder)!r}: {error}") from error
    try:
        loaded = PeftModel.from_pretrained(model, folder, adapter_name=adapter_name, is_trainable=is_trainable)
    except (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, ImportError) as error:
        if offloaded := _offloaded(model):
            raise AdapterError(
                f"the adapter in {str(folder)!r} cannot be loaded while {offloaded} is offloaded: PEFT has no way to "
                f"put factors on fused experts there. Load {type(model).__name__} without 'cpu' and 'disk' in its "
                "device_map, for instance in a smaller dtype."
            ) from error
        # a line for each tensor that does not fit: the first say enough
        said = " ".join(str(error).split())
        raise AdapterError(
            f"the adapter in {str(folder)!r} does not fit {type(model).__name__}: {said:.400}"
        ) from error
    state = get_peft_model_state_dict(loaded, adapter_name=adapter_name, save_embedding_layers=False)
    _check_tensors(folder, stored, state)
    if (folder / HASH_FILE).is_file() and model.device.type != "meta":
        verify_adapter_base(folder, loaded, strict=strict_router)
    if accelerate and _has_expert_lora(loaded):
        from hf_moe.adapters.expert_lora import accelerate_adapters

        accelerate_adapters(loaded)
    return loaded


def _offloaded(model: PreTrainedModel) -> str | None:
    """A module that accelerate brings in only when it runs, and where it is meanwhile."""
    for name, place in getattr(model, "hf_device_map", {}).items():
        if place in ("cpu", "disk") and any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
            return f"{name!r} ({place})"
    return None


def check_adapter(folder: Path) -> list[StoredTensor]:
    """Check an adapter's files without a model; the weights' names and shapes.

    Raises:
        AdapterError: Naming the file, the value and the rule.
    """
    config = _read_config(folder)
    stored = _read_weights(folder)
    _check_config(folder, config, stored)
    return stored


def _read_weights(folder: Path) -> list[StoredTensor]:
    if not (folder / WEIGHTS).is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which can run code)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise AdapterError(f"{str(folder)!r} holds no {WEIGHTS}{pickled}. Save the adapter with save_pretrained.")
    try:
        stored = read_headers([str(folder / WEIGHTS)])
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    if not any(math.prod(tensor.shape) for tensor in stored):
        raise AdapterError(f"{str(folder / WEIGHTS)!r} holds no tensor. Save the adapter again.")
    return stored


def _check_config(folder: Path, config: Mapping[str, Any], stored: Sequence[StoredTensor]) -> None:
    """Sizes must be ones that the tensors explain, and numbers be numbers."""
    path = str(folder / CONFIG)
    # a tensor without elements explains nothing: it may have any size at no cost
    largest = max(size for tensor in stored if math.prod(tensor.shape) for size in tensor.shape)
    for field in _SIZES:
        for value in _values(config.get(field)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= largest:
                raise AdapterError(
                    f"{field} in {path!r} must be an integer from 0 to {largest} (the largest size in the adapter's "
                    f"tensors), got {value!r:.80}."
                )
    for field in _FACTORS:
        for value in _values(config.get(field)):
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise AdapterError(f"{field} in {path!r} must be a finite number, got {value!r:.80}.")
    for field, number in _numbers(config):
        if not (abs(number) < _LARGEST_INTEGER if isinstance(number, int) else math.isfinite(number)):
            raise AdapterError(f"{field} in {path!r} must be a finite number, got {number!r:.80}.")
    for field, why in _REFUSED.items():
        if config.get(field) is not None:
            raise AdapterError(f"{field} in {path!r} must be null, got {config[field]!r:.80}: it {why}.")


def _values(field: Any) -> list[Any]:
    """The values of a field that is a number or a mapping of patterns to numbers."""
    if field is None:
        return []
    return list(field.values()) if isinstance(field, Mapping) else [field]


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Every number in the config, however deep, with the field that it is under."""
    rest = list(config.items())
    while rest:
        field, value = rest.pop()
        if isinstance(value, Mapping):
            rest += ((field, each) for each in value.values())
        elif isinstance(value, list):
            rest += ((field, each) for each in value)
        elif isinstance(value, int | float):
            yield field, value


def _local(adapter: str | Path, revision: str | None) -> Path:
    if Path(adapter).exists():
        if revision is not None:
            raise AdapterError(f"{str(adapter)!r} is a folder, which has no revision {revision!r}. Leave it out.")
        return Path(adapter)
    try:
        find_model(str(adapter), file=CONFIG)  # the client asks for long before it gives up
    except ModelError as error:
        raise AdapterError(str(error)) from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(str(adapter), revision=revision, allow_patterns=list(_FILES)))
    except GatedRepoError as error:
        raise AdapterError(f"{adapter} is gated and this account has no access. Ask for it on its page.") from error
    except RevisionNotFoundError as error:
        raise AdapterError(f"{adapter} has no branch, tag or commit {revision!r}.") from error
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise AdapterError(
            f"there is no adapter {str(adapter)!r:.200}, neither a folder nor on the Hub, as far as this "
            "account may see."
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        said = " ".join(str(error).split())
        raise AdapterError(f"{str(adapter)!r:.200} is no folder, and the Hub does not give it: {said:.300}") from error


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
        raise AdapterError(
            f"{file!r} holds {surplus[0]!r} ({len(surplus)} in all), which the adapter has no place for: it "
            "belongs to the base, or to nothing."
        )
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
