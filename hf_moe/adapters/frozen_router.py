"""Freeze the routers of a model, and prove that they stayed frozen.

A router here is its module (weights, biases, correction-bias buffers) and what its block keeps for it: four families
of transformers 5.23 hold the correction bias of the choice beside the router (AFMoE, HY-V3, LFM2-MoE, MiniMax-M2).
"""

import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.utils import is_peft_available

from hf_moe.adapters.router_values import VERSION, first_hashes, values_hash
from hf_moe.adapters.sharded import is_sharded, refuse_flat_shards, reshard, whole_tensor
from hf_moe.io.json_files import read_json
from hf_moe.io.whole_files import write_json
from hf_moe.layers.moe_layers import MoeLayer, moe_layers, plain_name
from hf_moe.layers.unseen_experts import required_layers

logger = logging.getLogger(__name__)

HASH_FILE = "router_hash.json"
LARGEST_RECORD = 2**20  # bytes
# what configs and model classes of transformers, and of hf_moe, call the weights of the losses that train a router
AUXILIARY_COEFFICIENTS = ("router_aux_loss_coef", "router_z_loss_coef", "aux_loss_coef")


class RouterNotFrozenError(RuntimeError):
    """A router has changed, or something is set up to change it."""


def freeze_router(model: nn.Module, *, keep_aux_loss: bool = False) -> str:
    """Freeze every router of a model of any family, in place: no gradient reaches its weights, biases or buffers.

    The auxiliary losses can balance nothing through a frozen router; they would only move attention and experts. So
    they are turned off, in the model and in its configs (and so in saved ones), with a line in the log. TRL's trainers
    take the coefficient from the config when they are built: call this before. An adapter may be attached before or
    after.

    Args:
        model: The model, with or without adapters; with sharded routers every process calls this.
        keep_aux_loss: Leave the auxiliary losses as they are; what is on is logged.

    Returns:
        `router_hash(model)`, 64 hexadecimal digits, for `verify_router_frozen` after the training.

    Raises:
        RouterNotFrozenError: If an adapter or a trainable copy is attached to a router.
        ValueError: If the model has no MoE layer, a block without a router module, or no values (meta device, FSDP
            version 1, DeepSpeed ZeRO-3).
    """
    reshard(model)
    for layer, router in _routed_layers(model):
        for tensor in _router_tensors(model, layer, router).values():
            if tensor.requires_grad:
                tensor.requires_grad_(False)
    digest = verify_router_frozen(model)
    if keep_aux_loss:
        report_auxiliary_losses(model)
    else:
        _turn_off_auxiliary_losses(model)
    return digest


def verify_router_frozen(model: nn.Module, expected_hash: str | None = None) -> str:
    """Check that no router can be trained and, given an earlier hash, that none has changed; returns `router_hash`.

    Raises:
        RouterNotFrozenError: Naming the first router that requires a gradient, carries an adapter or has a trainable
            copy (`modules_to_save`); or if the hash differs.
    """
    reshard(model)
    layers = _routed_layers(model)
    routers = {id(module): layer.name for layer, router in layers for module in router.modules()}
    if is_peft_available():
        _refuse_adapters(model, routers)
    for layer, router in layers:
        for name, tensor in _router_tensors(model, layer, router).items():
            if tensor.requires_grad:
                raise RouterNotFrozenError(
                    f"router parameter {layer.name}.{name} requires a gradient; a frozen router has none. Call "
                    "freeze_router(model) before the training, and leave its routers frozen."
                )
    actual = router_hash(model)
    if expected_hash is not None and not _has_hash(model, actual, expected_hash):
        raise RouterNotFrozenError(
            f"the routers have changed: sha256 {actual}, expected {expected_hash}. Train with freeze_router(model)."
        )
    return actual


def router_hash(model: nn.Module) -> str:
    """SHA-256 over all routers: the position in the model, name, shape and values of each parameter and buffer.

    The same whatever the dtype they are stored in, as long as it holds the same values; before and after an adapter
    is attached elsewhere; after saving and loading; and however FSDP2 or tensor parallelism shards them (they are
    gathered one by one: every process calls this).

    Raises:
        ValueError: If a router's weights are not there (meta device, FSDP version 1, DeepSpeed ZeRO-3).
    """
    return values_hash(_router_values(model))


def save_router_hash(folder: str | Path, model: nn.Module) -> str:
    """Write `router_hash(model)` into `folder` as `router_hash.json`, beside an adapter or a model; returns the hash.

    With sharded routers every process calls this, and the first one writes.

    A file of its own, because PEFT writes only the fields that it knows into its config, and warns of others.
    `Trainer.push_to_hub` uploads the folder with it; `model.push_to_hub` uploads what it saves itself, so add the file
    (`huggingface_hub.upload_file`).
    """
    record = router_record(model)
    if not is_sharded(model) or dist.get_rank() == 0:
        write_router_record(folder, record)
    return str(record["router_sha256"])


def router_record(model: nn.Module) -> dict[str, Any]:
    """The contents of `router_hash.json`; every process calls this. `dtype` notes in which to load the base."""
    return {
        "version": VERSION,
        "router_sha256": router_hash(model),
        "routers": len(_routed_layers(model)),
        "dtype": _router_dtypes(model),
    }


def write_router_record(folder: str | Path, record: dict[str, Any]) -> None:
    """The record of `router_record` as `router_hash.json` in `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder, HASH_FILE), record)


def verify_adapter_base(folder: str | Path, model: nn.Module, *, strict: bool = False) -> bool:
    """Compare the routers of `model` with those that the adapter (or checkpoint) in `folder` was trained with.

    Records of earlier versions of hf_moe, whose hash depended on the dtype, are compared as well.

    Args:
        folder: Holds `router_hash.json`, which `RouterFreezeCallback` and `save_router_hash` write.
        model: The base, or the base with the adapter loaded.
        strict: Raise where the default warns: routers differ, or the folder has no record of them.

    Returns:
        True if they are the same.

    Raises:
        RouterNotFrozenError: With `strict`.
        ValueError: If the record is damaged, or of a later version of hf_moe.
    """
    path = Path(folder, HASH_FILE)
    problem: str | None
    if not path.exists():
        problem = (
            f"{str(folder)!r} has no {HASH_FILE}: which routers it was trained with cannot be told. Train with "
            "RouterFreezeCallback, or write it with save_router_hash."
        )
    else:
        problem = router_difference(folder, _read_record(path), model)
    if problem is None:
        return True
    if strict:
        raise RouterNotFrozenError(problem)
    warnings.warn(problem, stacklevel=2)
    return False


def router_difference(folder: str | Path, record: dict[str, Any], model: nn.Module) -> str | None:
    """A sentence about how the routers of `model` differ from the `checked_record` of `folder`; None if they do not.

    Raises:
        ValueError: As `router_hash`.
    """
    actual, dtype = router_hash(model), _router_dtypes(model)
    recorded = record["router_sha256"]
    if _has_hash(model, actual, recorded, None if record["version"] == VERSION else record["dtype"]):
        return None
    problem = (
        f"the routers differ from those that {str(folder)!r} was trained with: sha256 {actual}, recorded {recorded}. "
    )
    if dtype != record["dtype"]:
        return problem + (
            f"The values may have been rounded: recorded in {record['dtype']}, here {dtype}. Load the base with that "
            "dtype to compare."
        )
    return problem + "Load the base that the adapter was trained on."


def _has_hash(model: nn.Module, actual: str, expected: str, first_dtypes: str | None = "") -> bool:
    """True if `expected` is the hash of these routers: the `actual` one, or the first form's, stored as recorded.

    Args:
        first_dtypes: The dtypes that the first form was recorded with; None if it is not of the first form.
    """
    if actual == expected:
        return True
    return first_dtypes is not None and expected in first_hashes(list(_router_values(model)), first_dtypes)


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = read_json(path, largest=LARGEST_RECORD, allow_nan=True)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}): take it from the adapter again.") from error
    return checked_record(path, record)


def checked_record(path: Path, record: Any) -> dict[str, Any]:
    """Check the contents of `router_hash.json` (at `path`) and return version, hash and dtype.

    Raises:
        ValueError: If it is none, or one of a later version of hf_moe.
    """
    digest = record.get("router_sha256") if isinstance(record, dict) else None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(
            f"{str(path)!r} must hold 64 hexadecimal digits under 'router_sha256', got {digest!r:.80}: take it from "
            "the adapter again."
        )
    version = record.get("version", 1)
    if isinstance(version, bool) or version not in (1, VERSION):
        raise ValueError(
            f"{str(path)!r} is of version {version!r:.80}, this hf_moe reads up to {VERSION}. Update hf_moe."
        )
    return {"version": version, "router_sha256": digest, "dtype": str(record.get("dtype"))}


def _router_values(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The tensors of each router, whole and on the CPU."""
    refuse_flat_shards(model)
    for layer, router in _routed_layers(model):
        tensors = _router_tensors(model, layer, router)
        yield {name: whole_tensor(tensors[name], f"{layer.name}.{name}") for name in sorted(tensors)}


def _router_dtypes(model: nn.Module) -> str:
    tensors = [t for layer, router in _routed_layers(model) for t in _router_tensors(model, layer, router).values()]
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def verify_adapter_without_router(folder: str | Path, model: nn.Module) -> None:
    """Check that the saved adapter in `folder` holds no tensor of one of the model's routers.

    Raises:
        RouterNotFrozenError: Naming the first such tensor.
    """
    from safetensors import safe_open

    routers = {plain_name(layer.router_name or "") for layer, _ in _routed_layers(model)}
    with safe_open(Path(folder, "adapter_model.safetensors"), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            if any(f"{name}." in plain_name(key) + "." for name in routers):
                raise RouterNotFrozenError(
                    f"the adapter in {str(folder)!r} holds {key!r}, a router's tensor. Do not target it."
                )


def active_auxiliary_losses(model: nn.Module) -> dict[str, float]:
    """Names and weights of the balancing losses that the model's own forward adds in training; empty if it adds none.

    Models of transformers add theirs with the router logits (`output_router_logits`); those of hf_moe, which have a
    z-loss, whenever they train.
    """
    is_on = any(
        _coefficients(owner) and (getattr(owner, "output_router_logits", False) or "router_z_loss_coef" in vars(owner))
        for owner in _loss_settings(model)
    )
    return auxiliary_coefficients(model) if is_on else {}


def auxiliary_coefficients(model: nn.Module) -> dict[str, float]:
    """Names and weights of the balancing losses in the model and its configs, whether its forward adds them or not."""
    return {name: value for owner in _loss_settings(model) for name, value in _coefficients(owner).items()}


def _coefficients(owner: Any) -> dict[str, float]:
    return {name: vars(owner)[name] for name in AUXILIARY_COEFFICIENTS if vars(owner).get(name)}


def report_auxiliary_losses(model: nn.Module) -> bool:
    """Log a warning if a loss that trains routers is on, and tell whether one is."""
    coefficients = active_auxiliary_losses(model)
    if coefficients:
        logger.warning(
            "auxiliary losses are on with a frozen router (%s): they train attention and experts alone. "
            "freeze_router(model) turns them off.",
            ", ".join(f"{name}={value}" for name, value in coefficients.items()),
        )
    return bool(coefficients)


def _turn_off_auxiliary_losses(model: nn.Module) -> None:
    changed: dict[str, Any] = {}
    for owner in _loss_settings(model):
        for name in AUXILIARY_COEFFICIENTS:
            if vars(owner).get(name):
                changed[name] = vars(owner)[name]
                setattr(owner, name, 0.0)
        # a model's own property of that name would not be in its attributes
        if vars(owner).get("output_router_logits"):
            changed["output_router_logits"] = True
            owner.output_router_logits = False
    if changed:
        logger.warning(
            "auxiliary losses are off, because the router is frozen (was: %s); a trainer of TRL that is built already "
            "keeps its own. keep_aux_loss=True keeps them.",
            ", ".join(f"{name}={value}" for name, value in changed.items()),
        )


def _loss_settings(model: nn.Module) -> Iterator[Any]:
    """Every module and config that may hold a coefficient: model classes copy theirs from the config."""
    seen: set[int] = set()
    for module in model.modules():
        yield module
        config = vars(module).get("config")
        pending = [config] if isinstance(config, PreTrainedConfig) else []
        while pending:
            config = pending.pop()
            if id(config) not in seen:
                seen.add(id(config))
                yield config
                pending += [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]


def refuse_router_adapters(model: nn.Module) -> None:
    """Raise RouterNotFrozenError if an adapter is on a router, or on the block that holds it, or a copy of one is."""
    parts: dict[int, str] = {}
    for layer in moe_layers(model):
        modules = [model.get_submodule(layer.name), *(layer.router.modules() if layer.router is not None else ())]
        parts |= {id(module): layer.name for module in modules}
    _refuse_adapters(model, parts)


def _refuse_adapters(model: nn.Module, routers: dict[int, str]) -> None:
    """Raise if a PEFT layer adapts one of the `routers` (name by id), or keeps a trainable copy of one."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            touched = [module, module.get_base_layer()]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            touched = list(module.modules())
        else:
            continue
        for part in touched:
            if id(part) in routers:
                raise RouterNotFrozenError(
                    f"{path} ({type(module).__name__}) trains the router of {routers[id(part)]}. Take the router out "
                    "of target_modules, target_parameters and modules_to_save ('all-linear' includes it)."
                )


def _routed_layers(model: nn.Module) -> list[tuple[MoeLayer, nn.Module]]:
    """Layers with their routers.

    Raises:
        ValueError: If there is no router to freeze: that would prove nothing.
    """
    layers = required_layers(model)
    for layer in layers:
        if layer.router is None:
            raise ValueError(f"the block {layer.name!r} routes by itself: it has no router module to freeze.")
    return [(layer, layer.router) for layer in layers if layer.router is not None]


def _router_tensors(model: nn.Module, layer: MoeLayer, router: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the router by name, and those with a value for each expert that its block keeps."""
    block = model.get_submodule(layer.name)
    own = {f"block.{name}": tensor for name, tensor in [*block._parameters.items(), *block._buffers.items()]}
    biases = {name: tensor for name, tensor in own.items() if tensor is not None}
    biases = {name: tensor for name, tensor in biases.items() if tensor.numel() == layer.num_experts}
    return {**dict(router.named_parameters()), **dict(router.named_buffers()), **biases}
