"""Weight drift: how far the weights of two models are apart, read one model at a time.

Of every matrix of an expert at most `SAMPLE` entries are kept, at positions that depend on nothing but its size: the
relative Frobenius norm of a change is exact for smaller matrices, and has a standard error of about 1 % for larger
ones. So two models need not be in memory together, and what is kept of the first is small.

Shape suffixes: E experts, S kept entries of each.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.utils import is_peft_available

from hf_moe.adapters.esft import SelectedExperts
from hf_moe.layers.moe_layers import MoeLayer, moe_layers
from hf_moe.layers.storage import DENSE_DTYPES

SAMPLE = 32_768
_SEED = 0


class UnreadableWeightsError(ValueError):
    """Weights that are not stored as plain numbers."""


@dataclass(frozen=True)
class TensorSample:
    """Entries of one tensor.

    Attributes:
        shape: Of the whole tensor.
        entries: `[E, S]` for experts, `[1, S]` for a router; float32 (float64 where it is stored so), on the CPU.
        scale: How many entries of the tensor each kept one stands for.
    """

    shape: tuple[int, ...]
    entries: Tensor
    scale: float


@dataclass(frozen=True)
class LayerWeights:
    """Samples of the weights of one layer.

    Attributes:
        router, experts: Samples by the tensor's name; None if they cannot be read, for the reason in `unreadable`.
    """

    router: dict[str, TensorSample] | None
    experts: dict[str, TensorSample] | None
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerDrift:
    """Norm of the change over the norm of the base; None where it is not known.

    Attributes:
        by_expert: `[E]` float64, of each expert alone.
    """

    router: float | None
    experts: float | None
    by_expert: Tensor | None
    left_out: tuple[str, ...] = field(default=())


@torch.no_grad()
def sample_weights(model: nn.Module) -> dict[str, LayerWeights]:
    """Sample a model's routers and routed experts, by layer name; active LoRA adapters are added to them."""
    return {layer.plain_name: _sample_layer(model, layer) for layer in moe_layers(model)}


def weight_drift(base: LayerWeights, new: LayerWeights) -> LayerDrift:
    """Compare the weights of one layer with those of the base."""
    router, _, router_reason = _drift("router", base.router, new.router)
    experts, by_expert, experts_reason = _drift("experts", base.experts, new.experts)
    reasons = (*base.unreadable, *new.unreadable, router_reason, experts_reason)
    return LayerDrift(router, experts, by_expert, tuple(dict.fromkeys(reason for reason in reasons if reason)))


def is_exact(weights: dict[str, LayerWeights]) -> bool:
    """True if every entry was kept."""
    samples = [part for layer in weights.values() for part in (layer.router, layer.experts) if part is not None]
    return all(sample.scale == 1.0 for part in samples for sample in part.values())


def _sample_layer(model: nn.Module, layer: MoeLayer) -> LayerWeights:
    reasons: list[str] = []

    def read(what: str, tensors: Callable[[], Iterator[tuple[str, Tensor]]], groups: int) -> dict | None:
        try:
            return {name: _sample(tensor, groups) for name, tensor in tensors()}
        except UnreadableWeightsError as error:
            reasons.append(f"Drift of the {what} is left out: {error}.")
            return None

    router = None
    if layer.router is not None:
        router = read("routers", lambda: _router_tensors(model, layer), 1)
    else:
        reasons.append("Drift of the routers is left out: the blocks route by themselves.")
    called = model.get_submodule(layer.called_experts_name)
    experts = read("experts", lambda: _tensors(called, buffers=False), layer.num_experts)
    return LayerWeights(router, experts, tuple(reasons))


def _router_tensors(model: nn.Module, layer: MoeLayer) -> Iterator[tuple[str, Tensor]]:
    assert layer.router is not None
    yield from _tensors(layer.router, buffers=True)
    # four families keep the correction bias beside the router
    block = model.get_submodule(layer.name)
    for name, tensor in [*block._parameters.items(), *block._buffers.items()]:
        if tensor is not None and tensor.is_floating_point() and tensor.numel() == layer.num_experts:
            yield f"block.{name}", tensor


def _tensors(module: nn.Module, *, buffers: bool, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The weights below `module` as the forward uses them, under their names without wrappers."""
    if isinstance(module, SelectedExperts):
        yield from _tensors(module.write_back(), buffers=buffers, prefix=prefix)
        return
    if is_peft_available():
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(module, BaseTunerLayer):
            adapted, deltas = _deltas(module)
            for name, tensor in _tensors(module.base_layer, buffers=buffers, prefix=prefix):
                yield name, _with_deltas(tensor, deltas) if name == f"{prefix}{adapted}" else tensor
            return
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save
            copies = [trained[name] for name in module.active_adapters if name in trained]
            yield from _tensors((copies or [module.original_module])[-1], buffers=buffers, prefix=prefix)
            return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield f"{prefix}{name}", _checked(parameter)
    for name, buffer in module._buffers.items() if buffers else ():
        if buffer is not None and buffer.is_floating_point():
            yield f"{prefix}{name}", _checked(buffer)
    for name, child in module.named_children():
        yield from _tensors(child, buffers=buffers, prefix=f"{prefix}{name}.")


def _deltas(wrapper) -> tuple[str, list[Tensor]]:
    """The parameter that a PEFT layer changes, and what its active adapters add to it."""
    if wrapper.disable_adapters or wrapper.merged or not hasattr(wrapper, "get_delta_weight"):
        return "", []
    names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    return getattr(wrapper, "parameter_name", "weight"), [wrapper.get_delta_weight(name) for name in names]


def _with_deltas(tensor: Tensor, deltas: list[Tensor]) -> Tensor:
    # float32: a small update disappears in the rounding of 16-bit weights
    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    for delta in deltas:
        wide = wide + delta.to(wide)
    return wide


def _checked(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        raise UnreadableWeightsError("the weights are not in memory (offloaded)")
    if tensor.dtype not in DENSE_DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UnreadableWeightsError(f"they are stored as {kind}, quantised")
    return tensor


def _sample(tensor: Tensor, groups: int) -> TensorSample:
    """`groups`: the number of experts where the tensor holds one matrix for each."""
    is_stack = tensor.dim() > 1 and tensor.shape[0] == groups
    flat_ES = tensor.detach().reshape(groups if is_stack else 1, -1)
    size = flat_ES.shape[1]
    if size > SAMPLE:
        generator = torch.Generator().manual_seed(_SEED)
        positions = torch.randperm(size, generator=generator)[:SAMPLE].sort().values
        flat_ES = flat_ES[:, positions.to(flat_ES.device)]
    entries = flat_ES.cpu()
    entries = entries.clone() if entries.dtype == torch.float64 else entries.float().clone()
    return TensorSample(tuple(tensor.shape), entries, max(size / SAMPLE, 1.0))


def _drift(
    what: str, base: dict[str, TensorSample] | None, new: dict[str, TensorSample] | None
) -> tuple[float | None, Tensor | None, str]:
    if base is None or new is None:
        return None, None, ""
    shapes = [{name: sample.shape for name, sample in side.items()} for side in (base, new)]
    if shapes[0] != shapes[1]:
        return None, None, f"Drift of the {what} is left out: their weights differ in shape."
    rows = max((len(sample.entries) for sample in base.values()), default=0)
    if not rows:
        return None, None, f"Drift of the {what} is left out: they have no weights."
    changed, size = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, dtype=torch.float64)
    for name, before in base.items():
        one, two = before.entries.double(), new[name].entries.double()
        # a tensor that is not one of a stack counts with all experts alike
        changed += before.scale * (two - one).square().sum(-1) / (rows // len(one))
        size += before.scale * one.square().sum(-1) / (rows // len(one))
    by_expert = torch.where(size > 0, changed / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0).sqrt()
    return _relative(float(changed.sum()), float(size.sum())), by_expert, ""


def _relative(changed: float, size: float) -> float:
    if size:
        return math.sqrt(changed / size)
    return math.inf if changed else 0.0
