"""Models that count as quantised while their experts, most of their bytes, are not.

transformers 5 keeps the experts of a layer in one parameter for each projection; a quantiser that replaces
`nn.Linear` passes over them without a word. What is stored decides, and `config.quantization_config` says by whom.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.storage import DENSE_DTYPES, attached_storage, storage_of

# integers of this size are indices and masks
_INDICES = (torch.int64, torch.bool)
# quantisers of transformers 5.23 whose code knows nn.Linear and no experts (`tests/observability` reads it)
LINEAR_ONLY = (
    "bitsandbytes",
    "quanto",
    "gptq",
    "awq",
    "hqq",
    "eetq",
    "nvfp4",
    "bitnet",
    "vptq",
    "spqr",
    "aqlm",
    "higgs",
)
_EXPERTS_TOO = ("fp8", "mxfp8", "mxfp4")


@dataclass(frozen=True)
class _Weights:
    """Bytes of all weights, of the plain experts, and of what is packed; how many tensors are packed."""

    total: int
    experts: int
    expert_dtypes: tuple[str, ...]
    packed: int
    packed_tensors: int


def unquantised_experts(model: nn.Module, layers: list[MoeLayer], config: Any) -> str | None:
    """A sentence if `model` is quantised and its experts are stored in 16 or more bits, or will be; else None."""
    found = _weigh(model, layers, buffers=quantisation_method(config) is not None)
    method = quantisation_method(config)
    if not found.experts or (method is None and not found.packed):
        return None
    if not found.packed and all(parameter.is_meta for parameter in model.parameters()):
        return _of_config(method or "", config, found)
    return (
        f"{method or 'A quantiser'} left the experts as they were, in {', '.join(found.expert_dtypes)}: "
        f"{found.experts:,} of {found.total:,} bytes ({found.experts / found.total:.0%}); quantised are "
        f"{found.packed_tensors:,} other tensors, {found.packed:,} bytes."
    )


def quantisation_method(config: Any) -> str | None:
    """What `config.quantization_config` names; None without one."""
    for each in (config, getattr(config, "text_config", None)):
        settings = getattr(each, "quantization_config", None)
        if settings is not None:
            name = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
            return str(getattr(name, "value", name))
    return None


def _of_config(method: str, config: Any, found: _Weights) -> str | None:
    """What will happen when the weights are loaded."""
    if method in _EXPERTS_TOO:
        return None
    dtypes, share = ", ".join(found.expert_dtypes), f"{found.experts / found.total:.0%}"
    if method in LINEAR_ONLY or (method == "torchao" and "Fqn" not in str(config.quantization_config)):
        return (
            f"The config asks for {method}, which quantises linear layers alone: the experts will stay in {dtypes}, "
            f"{found.experts:,} bytes ({share} of the weights before quantisation)."
        )
    return (
        f"The config asks for {method}; whether that reaches the experts ({share} of the weights, {found.experts:,} "
        f"bytes in {dtypes}) shows once it is loaded: explain(model) tells."
    )


def _weigh(model: nn.Module, layers: list[MoeLayer], *, buffers: bool) -> _Weights:
    # what a quantiser attached stores them, whatever stands in the parameters' places
    attached = [layer.experts for layer in layers if attached_storage(layer.experts) is not None]
    counted = {id(tensor) for experts in attached for tensor in [*experts.parameters(), *experts.buffers()]}
    own_experts = [layer.experts for layer in layers if layer.experts not in attached]
    experts = {id(p): p for module in own_experts for p in module.parameters() if _is_plain(p)}
    weights: list[Tensor] = [p for p in model.parameters() if id(p) not in counted]
    # GPTQ and AWQ keep packed weights in buffers
    weights += [buffer for buffer in model.buffers() if buffers and id(buffer) not in counted and _is_packed(buffer)]
    packed = [weight for weight in weights if _is_packed(weight)]
    own = {id(p) for layer in layers for p in layer.experts.parameters()}
    is_whole = all(id(p) in experts or not _is_packed(p) for layer in layers for p in layer.experts.parameters())
    return _Weights(
        total=sum(map(stored_bytes, weights)) + sum(sum(storage_of(each).nbytes().values()) for each in attached),
        experts=sum(map(stored_bytes, experts.values())) if is_whole else 0,
        expert_dtypes=tuple(sorted({str(p.dtype).removeprefix("torch.") for p in experts.values()})),
        packed=sum(stored_bytes(weight) for weight in packed if id(weight) not in own),
        packed_tensors=sum(id(weight) not in own for weight in packed),
    )


def _inner_tensors(weight: Tensor) -> Iterable[Tensor] | None:
    """What a tensor subclass (torchao, quanto) is made of; None for a plain or a sharded tensor."""
    if isinstance(weight, DTensor) or not is_traceable_wrapper_subclass(weight):
        return None
    names, _ = weight.__tensor_flatten__()
    return [getattr(weight, name) for name in names]


def _is_packed(weight: Tensor) -> bool:
    return _inner_tensors(weight) is not None or (weight.dtype not in DENSE_DTYPES and weight.dtype not in _INDICES)


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype in DENSE_DTYPES and not _is_packed(weight)


def stored_bytes(weight: Tensor) -> int:
    """Bytes of the weight as it is stored; of one shard, where it is sharded."""
    inner = _inner_tensors(weight)
    if inner is not None:
        return sum(map(stored_bytes, inner))
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return local.numel() * local.element_size()
