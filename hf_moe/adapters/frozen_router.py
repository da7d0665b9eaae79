"""Freeze the routers of a model, and prove that they stayed frozen."""

import hashlib
from pathlib import Path

import torch
from torch import nn
from transformers.utils import is_peft_available

from hf_moe.models.moe_layers import MoeLayer, moe_layers


class RouterNotFrozenError(RuntimeError):
    """A router has changed, or something is set up to change it."""


def freeze_router(model: nn.Module) -> str:
    """Stop gradients into every router and return `router_hash(model)`, to compare with later.

    Raises:
        RouterNotFrozenError: If an adapter or a trainable copy is attached to a router.
    """
    for _, router in _routed_layers(model):
        router.requires_grad_(False)
    return verify_router_frozen(model)


def verify_router_frozen(model: nn.Module, expected_hash: str | None = None) -> str:
    """Check that no router can be trained and, given an earlier hash, that none has changed; returns `router_hash`.

    Raises:
        RouterNotFrozenError: Naming the first router that requires a gradient, carries an adapter or has a trainable
            copy (`modules_to_save`); or if the hash differs.
    """
    layers = _routed_layers(model)
    for layer, router in layers:
        for name, parameter in router.named_parameters():
            if parameter.requires_grad:
                raise RouterNotFrozenError(
                    f"router parameter {layer.name}.{name} requires a gradient; a frozen router has none. Call "
                    "freeze_router(model) after the adapter is attached."
                )
    routers = {id(module): layer.name for layer, router in layers for module in router.modules()}
    if is_peft_available():
        _refuse_adapters(model, routers)
    actual = router_hash(model)
    if expected_hash is not None and actual != expected_hash:
        raise RouterNotFrozenError(
            f"the routers have changed: sha256 {actual}, expected {expected_hash}. Train with freeze_router(model), "
            "and compare models of one dtype."
        )
    return actual


def router_hash(model: nn.Module) -> str:
    """SHA-256 over all routers: the position in the model, name, dtype, shape and bytes of each parameter and buffer.

    The same before and after an adapter is attached elsewhere, and after saving and loading in one dtype.

    Raises:
        ValueError: If a router's weights are not there (meta device).
    """
    digest = hashlib.sha256()
    for position, (layer, router) in enumerate(_routed_layers(model)):
        tensors = {**dict(router.named_parameters()), **dict(router.named_buffers())}
        for name in sorted(tensors):
            tensor = tensors[name].detach()
            if tensor.is_meta:
                raise ValueError(
                    f"router {layer.name}.{name} is on the meta device: it has no weights. Load the model first."
                )
            digest.update(f"{position} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def verify_adapter_without_router(folder: str | Path, model: nn.Module) -> None:
    """Check that the saved adapter in `folder` holds no tensor of one of the model's routers.

    Raises:
        RouterNotFrozenError: Naming the first such tensor.
    """
    from safetensors import safe_open

    routers = {_plain(layer.router_name) for layer, _ in _routed_layers(model)}
    with safe_open(Path(folder, "adapter_model.safetensors"), framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a dict)
            if any(f"{name}." in _plain(key) + "." for name in routers):
                raise RouterNotFrozenError(
                    f"the adapter in {str(folder)!r} holds {key!r}, a router's tensor. Do not target it."
                )


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
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer, so no router. Pass a Mixture-of-Experts model.")
    for layer in layers:
        if layer.router is None:
            raise ValueError(f"the block {layer.name!r} routes by itself: it has no router module to freeze.")
    return [(layer, layer.router) for layer in layers if layer.router is not None]


def _plain(name: str | None) -> str:
    """A module path without the prefix that PEFT adds."""
    return (name or "").removeprefix("base_model.model.")
