"""Load an untrusted PEFT adapter: checked by its files, compared with them, the base proved unchanged.

PEFT warns of missing and surplus tensors and continues, accepts NaN, reads pickles, writes into the base where a
config asks for it, and allocates what the config says before it looks at the weights. Here each is an error.
"""

import copy
import dataclasses
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_moe.adapters.adapter_files import CONFIG, WEIGHTS, AdapterError, AdapterFiles, check_adapter, read_bounded_json
from hf_moe.adapters.frozen_router import (
    HASH_FILE,
    LARGEST_RECORD,
    RouterNotFrozenError,
    checked_record,
    refuse_router_adapters,
    router_difference,
)
from hf_moe.adapters.unchanged_base import BaseOutputs, BaseState
from hf_moe.io.error_text import one_line
from hf_moe.io.installation import install_command
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.loading.errors import HUB_ERRORS, MISFITS, hub_sentence
from hf_moe.loading.pretrained import ModelError, find_model

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

# what PEFT reads from a repository
_FILES = (WEIGHTS, CONFIG, HASH_FILE)
# how values begin: they come from the file, and some beginnings write into the base
_STARTS = ("init_lora_weights", "init_weights", "init_ia3_weights")
_START_OPTIONS = ("eva_config", "corda_config", "lora_ga_config", "loftq_config")
# tensors in memory may be this much more than in the file: PEFT joins per-expert factors, with zeros between them
_MOST_GROWTH = 4
# what PEFT and the model raise for a config or tensors that do not fit
_UNFIT = (*MISFITS, ValueError, ImportError, re.error)


class AdapterRouterError(AdapterError, RouterNotFrozenError):
    """An adapter that was trained on other routers, or that would change them."""


def load_adapter(
    model: "PreTrainedModel | PeftModel",
    adapter: str | Path,
    adapter_name: str = "default",
    *,
    revision: str | None = None,
    is_trainable: bool = False,
    strict_router: bool = False,
    accelerate: bool = True,
) -> "PeftModel":
    """`PeftModel.from_pretrained` for adapters that are not trusted.

    Before: every field of the config has a rule and keeps it, the weights are one whole safetensors file (no pickle is
    ever read) of floating tensors that explains every size in the config, and nothing goes onto a router. After: the
    adapter holds exactly the file's tensors, finite; every parameter and buffer of the base has the value that it had
    (a hash of all of them, before and after); a few tokens give the same outputs to the last bit with the adapter off,
    and finite ones with it on. What `export_adapter` wrote is folded into the form of fused experts first.

    The proof reads the whole base twice, where it lies, and runs it on four tokens a few times: for 60 GB on CPUs
    about two minutes divided by the number of cores. It copies no weights (`BaseState`).

    Methods: LoRA (with rsLoRA, DoRA, aLoRA, patterns of ranks and alphas, trained tokens, and copies of modules such
    as the embeddings), IA3, LoHa, LoKr, adapter experts.

    Args:
        model: The base; or what this function returned, to add another adapter, which becomes the active one.
        adapter: A folder, or a name on the Hub.
        adapter_name: Letters, digits, `_` and `-`, at most 64.
        revision: Commit, tag or branch of an adapter on the Hub; of others' adapters pin the commit.
        strict_router: Refuse, instead of warn, if the adapter was trained on other routers; and refuse if it has no
            record of them (`verify_adapter_base`).
        accelerate: Run LoRA on fused experts through the factors, after the proof (`accelerate_adapters`).

    Raises:
        AdapterError: If the adapter is damaged, hostile, or of another model. `model` is then as it was before, or the
            message says what is not.
        ImportError: Without peft.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError(f"adapters need peft. Install it with: {install_command('recipes')}") from error
    from hf_moe.adapters.per_expert import is_per_expert

    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", adapter_name):
        raise AdapterError(f"an adapter's name is 1 to 64 letters, digits, '_' and '-', got {adapter_name!r:.80}.")
    files = check_adapter(_local(adapter, revision))
    _refuse_taken(model, adapter_name)
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    record = _router_record(files.folder, strict_router)
    if files.config["peft_type"] == "LORA" and is_per_expert(files.folder):
        options = {"is_trainable": is_trainable, "strict_router": strict_router, "accelerate": accelerate}
        return _load_fused(files, model, base, adapter_name, options)
    _check_copies(files, base)
    state, outputs = BaseState(model), BaseOutputs(model, base)
    try:
        _check_plan(files, model, adapter_name)
        state.restore()
        loaded = _attach(files, model, adapter_name, is_trainable)
        _check_base(files, loaded, state, outputs)
        _check_routers(files.folder, record, loaded, strict_router)
        if accelerate and _has_expert_lora(loaded):
            _accelerate(files, loaded)
        _check_outputs(files, loaded, outputs)
    except BaseException as error:
        state.restore()
        if isinstance(error, AdapterError) and (lost := state.difference(model)):
            raise AdapterError(f"{error} That could not be undone, and {lost}: load the base again.") from error
        raise
    return loaded


def _load_fused(
    files: AdapterFiles, model: Any, base: PreTrainedModel, adapter_name: str, options: dict
) -> "PeftModel":
    """Load an adapter of single experts in the form of fused ones; errors name the folder that it came from."""
    from hf_moe.adapters.per_expert import fused

    with _fitting(files, model), fused(files.folder, base) as folded:
        try:
            return load_adapter(model, folded, adapter_name, **options)
        except AdapterError as error:
            raise type(error)(str(error).replace(str(folded), str(files.folder))) from error


def _refuse_taken(model: Any, adapter_name: str) -> None:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(model, PeftModel):
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise AdapterError(
                f"this {type(model).__name__} has an adapter already: pass the PeftModel around it to add another, or "
                "load the base again."
            )
    elif adapter_name in model.peft_config:
        raise AdapterError(f"the model has an adapter {adapter_name!r} already: choose another adapter_name.")


def _check_copies(files: AdapterFiles, base: PreTrainedModel) -> None:
    """PEFT copies the modules that a config names, and rows for its tokens, before it looks at the weights."""
    names = tuple(files.config.get("modules_to_save") or ())
    copied = [module for path, module in base.named_modules() if path.endswith(names)]
    size = sum(tensor.numel() for module in copied for tensor in [*module.parameters(), *module.buffers()])
    tokens = files.config.get("trainable_token_indices") or []
    rows = sum(map(len, tokens.values())) if isinstance(tokens, Mapping) else len(tokens)
    if rows:
        weight: Any = base.get_input_embeddings().weight
        size += rows * weight.shape[-1]
    _check_size(files, size, "modules_to_save and trainable_token_indices name")


def _check_size(files: AdapterFiles, size: int, who: str) -> None:
    if size > _MOST_GROWTH * files.num_values:
        raise AdapterError(
            f"{who} {size:,} values, and {files.weights!r} holds {files.num_values:,}: the config and the weights are "
            "not of one adapter. Save it again."
        )


def _check_plan(files: AdapterFiles, model: Any, adapter_name: str) -> None:
    """Attach the adapter without its values, at no cost in memory: where it goes, how large it is, what it may set."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

    with _fitting(files, model):
        config = _peft_config(files)
        with torch.device("meta"):
            if isinstance(model, PeftModel):
                planned = model
                model.add_adapter(adapter_name, config, low_cpu_mem_usage=True)
            else:
                kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)
                planned = kind(model, config, adapter_name, low_cpu_mem_usage=True)
        places = get_peft_model_state_dict(planned, adapter_name=adapter_name, save_embedding_layers=False)
        try:
            refuse_router_adapters(planned)
        except RouterNotFrozenError as error:
            raise AdapterRouterError(f"the adapter in {str(files.folder)!r} is refused: {error}") from error
    described = sum(place.numel() for place in places.values())
    _check_sizes(files, planned, places, described)
    # PEFT renames factors of single experts; what is no factor and has no place would be written into the base
    foreign = sorted(
        tensor.name for tensor in files.tensors if tensor.name not in places and ".lora_" not in tensor.name
    )
    if foreign:
        raise _without_place(files, foreign)


def _check_sizes(files: AdapterFiles, planned: Any, places: Mapping[str, Tensor], described: int) -> None:
    """Compare the shapes in the file with those that this base asks for; PEFT would list every tensor."""
    stored = {tensor.name: tuple(tensor.shape) for tensor in files.tensors if tensor.name in places}
    misfit = f"the adapter in {str(files.folder)!r} does not fit this base: "
    if sizes := _expert_sizes(planned, stored, places):
        raise AdapterError(f"{misfit}{sizes}.{_own_base(files)}")
    _check_size(files, described, f"{CONFIG} describes")
    for name, shape in stored.items():
        if shape != (own := tuple(places[name].shape)):
            raise AdapterError(f"{misfit}{name!r} is {list(shape)} in it, and {list(own)} here.{_own_base(files)}")


def _expert_sizes(planned: Any, stored: Mapping[str, tuple], places: Mapping[str, Tensor]) -> str | None:
    """In words the experts that LoRA factors were made for and those of this base, of the first layer that differs."""
    paths = {id(module): path for path, module in planned.named_modules()}
    wrapped: dict[int, list[Any]] = {}
    for module in planned.modules():
        if getattr(module, "parameter_name", None) == "down_proj":
            wrapped.setdefault(id(module.get_base_layer()), []).append(module)
    for layer in moe_layers(planned):
        for wrapper in wrapped.get(id(layer.experts), ()):
            name = f"{paths[id(wrapper)]}.lora_A.weight"
            if name not in stored:
                continue
            (rows, width), (own_rows, own_width) = stored[name], places[name].shape
            experts, rest = divmod(layer.num_experts * rows, own_rows)
            # a rank that is not the config's is another error
            if experts and not rest and (experts, width) != (layer.num_experts, own_width):
                return (
                    f"it was made for {experts} experts of width {width}, and the base has {layer.num_experts} of "
                    f"width {own_width}"
                )
    return None


def _own_base(files: AdapterFiles) -> str:
    base = files.config.get("base_model_name_or_path")
    return " Load it on its own base" + (f", {base!r:.200}." if isinstance(base, str) and base else ".")


def _peft_config(files: AdapterFiles) -> "PeftConfig":
    """The checked fields as PEFT's config, without what would compute first values."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind: Any = PEFT_TYPE_TO_CONFIG_MAPPING[files.config["peft_type"]]
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(files.config) - known):
        raise AdapterError(
            f"{unknown[0]} in {str(files.folder / CONFIG)!r} is not known to peft {peft.__version__}: upgrade peft."
        )
    values = {name: value for name, value in files.config.items() if name not in _START_OPTIONS}
    return kind(**copy.deepcopy(values | {name: False for name in _STARTS if name in known}))


def _attach(files: AdapterFiles, model: Any, adapter_name: str, is_trainable: bool) -> "PeftModel":
    from peft import PeftModel, get_peft_model_state_dict

    with _fitting(files, model):
        config = _peft_config(files)
        if isinstance(model, PeftModel):
            config.inference_mode = not is_trainable
            loaded = model
            loaded.add_adapter(adapter_name, config)
            loaded.load_adapter(files.folder, adapter_name, is_trainable=is_trainable)
            loaded.set_adapter(adapter_name, inference_mode=not is_trainable)
        else:
            loaded = PeftModel.from_pretrained(
                model, files.folder, adapter_name=adapter_name, is_trainable=is_trainable, config=config
            )
        state = get_peft_model_state_dict(loaded, adapter_name=adapter_name, save_embedding_layers=False)
    _check_tensors(files, state)
    for name in set(_STARTS) & set(files.config):
        setattr(loaded.peft_config[adapter_name], name, files.config[name])
    return loaded


@contextmanager
def _fitting(files: AdapterFiles, model: Any) -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except _UNFIT as error:
        base = model if isinstance(model, PreTrainedModel) else model.get_base_model()
        if offloaded := _offloaded(base):
            raise AdapterError(
                f"the adapter in {str(files.folder)!r} cannot be loaded while {offloaded} is offloaded: PEFT does "
                f"not work with fused experts there. Load {type(base).__name__} without 'cpu' and 'disk' in its "
                "device_map, for instance in a smaller dtype."
            ) from error
        raise AdapterError(
            f"the adapter in {str(files.folder)!r} does not fit {type(base).__name__}: {one_line(error)}"
        ) from error


def _offloaded(model: PreTrainedModel) -> str | None:
    """A module that accelerate brings in only when it runs, and where it is meanwhile."""
    for name, place in getattr(model, "hf_device_map", {}).items():
        if place in ("cpu", "disk") and any(parameter.is_meta for parameter in model.get_submodule(name).parameters()):
            return f"{name!r} ({place})"
    return None


def _check_base(files: AdapterFiles, loaded: "PeftModel", state: BaseState, outputs: BaseOutputs) -> None:
    changed = state.difference(loaded)
    with _fitting(files, loaded):
        if changed is None and not outputs.are_those_of(loaded):
            changed = "with the adapter off it gives other outputs"
    if changed is not None:
        raise AdapterError(f"the adapter in {str(files.folder)!r} is refused, because it changes its base: {changed}.")


def _router_record(folder: Path, strict: bool) -> dict[str, Any] | None:
    """The adapter's record of its routers, checked; None if it has none and may."""
    path = folder / HASH_FILE
    if not os.path.lexists(path):
        if strict:
            raise AdapterRouterError(
                f"{str(folder)!r} has no {HASH_FILE}: which routers it was trained with cannot be told. Leave out "
                "strict_router, or write the record with save_router_hash."
            )
        return None
    if not path.is_file():
        raise AdapterError(f"{str(path)!r} is no file that can be read: take it from the adapter again.")
    record = read_bounded_json(path, LARGEST_RECORD)
    try:
        return checked_record(path, record)
    except ValueError as error:
        raise AdapterError(str(error)) from error


def _check_routers(folder: Path, record: dict[str, Any] | None, loaded: "PeftModel", strict: bool) -> None:
    """Compare the base's routers with the adapter's record of them, if it has one."""
    if record is None:
        return
    if loaded.device.type == "meta":
        if strict:
            raise AdapterRouterError("a model on the meta device has no routers to compare. Leave out strict_router.")
        return
    try:
        problem = router_difference(folder, record, loaded)
    except ValueError as error:
        raise AdapterError(str(error)) from error
    if problem is not None and strict:
        raise AdapterRouterError(problem)
    if problem is not None:
        warnings.warn(problem, stacklevel=3)


def _accelerate(files: AdapterFiles, loaded: "PeftModel") -> None:
    from hf_moe.adapters.expert_lora import accelerate_adapters

    try:
        accelerate_adapters(loaded)
    except ValueError as error:
        raise AdapterError(f"{error} Or load the adapter in {str(files.folder)!r} with accelerate=False.") from error


def _check_outputs(files: AdapterFiles, loaded: "PeftModel", outputs: BaseOutputs) -> None:
    with _fitting(files, loaded):
        finite = outputs.are_finite_on(loaded)
    if not finite:
        raise AdapterError(
            f"with the adapter in {str(files.folder)!r} the model gives NaN or infinite outputs: its scale "
            "(lora_alpha) or its values are too large. Load an earlier checkpoint."
        )


def _local(adapter: str | Path, revision: str | None) -> Path:
    """The adapter's folder, downloaded if it is a name on the Hub."""
    if Path(adapter).exists():
        if revision is not None:
            raise AdapterError(f"{str(adapter)!r} is a folder, which has no revision {revision!r}. Leave it out.")
        return Path(adapter)
    from huggingface_hub import snapshot_download

    try:
        find_model(str(adapter), file=CONFIG, revision=revision)  # the client asks for long before it gives up
        return Path(snapshot_download(str(adapter), revision=revision, allow_patterns=list(_FILES)))
    except ModelError as error:
        raise AdapterError(str(error)) from error
    except HUB_ERRORS as error:
        raise AdapterError(hub_sentence(error, str(adapter), revision)) from error


def _check_tensors(files: AdapterFiles, state: Mapping[str, Tensor]) -> None:
    """Compare the tensors in place with those of the file."""
    from safetensors import safe_open

    names = {tensor.name for tensor in files.tensors}
    if missing := sorted(set(state) - names):
        raise AdapterError(
            f"{files.weights!r} lacks {missing[0]!r} ({len(missing)} tensors in all), which would be new weights: "
            f"the adapter was made for a smaller model, or is damaged.{_own_base(files)}"
        )
    if surplus := sorted(names - set(state)):
        raise _without_place(files, surplus)
    with safe_open(files.weights, framework="pt") as opened:
        for name in sorted(names):
            _check_value(files, name, state[name].detach(), opened.get_tensor(name))


def _without_place(files: AdapterFiles, surplus: list[str]) -> AdapterError:
    return AdapterError(
        f"{files.weights!r} holds {surplus[0]!r} ({len(surplus)} in all), which the adapter has no place for on this "
        f"base: it belongs to the base, or to nothing.{_own_base(files)}"
    )


def _check_value(files: AdapterFiles, name: str, loaded: Tensor, stored: Tensor) -> None:
    where = f"{name!r} in {files.weights!r}"
    # also after the cast: a finite float64 may be infinite in float32
    cast = stored.to(loaded.dtype)
    if not bool(torch.isfinite(cast).all()):
        raise AdapterError(
            f"{where} holds NaN or infinite values, or such as {loaded.dtype} cannot hold. Load an earlier checkpoint."
        )
    if loaded.shape != cast.shape or not (loaded.is_meta or torch.equal(loaded.cpu(), cast)):
        raise AdapterError(f"{where} was not loaded as it is. Report this with the adapter's config.")


def _has_expert_lora(model: torch.nn.Module) -> bool:
    from peft.tuners.lora.layer import ParamWrapper

    return any(isinstance(module, ParamWrapper) for module in model.modules())
