"""Hear every routing decision of a model while it runs, whatever the family, the backend, and what wraps it.

The decision is taken where the block hands it to its experts: `(hidden_states, top_k_index, top_k_weights)` is the one
call that all families share. Under expert parallelism that call gets the ids of one process, so the router's own
return value counts there.

Shape suffixes: T tokens of one forward (batch times positions, padding included), K slots per token, X experts that
the router scores (null experts included), B rows, S positions.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .moe_layers import MoeLayer, moe_layers


@dataclass(frozen=True)
class Routing:
    """One forward of one MoE layer: what its router decided. The tensors are the live ones, with their gradient.

    Attributes:
        layer: The layer.
        logits: `[T, X]`, what the router returned first; raw logits in nearly all families, probabilities in some
            (`hf_moe.models.router_scores` tells). None if the router returned no such tensor.
        weights: `[T, K]`, the weights of the experts' outputs.
        index: `[T, K]`, integer ids; `num_experts` (of the layer) marks a slot without an expert: a null expert, an
            assignment dropped over capacity.
        mask: `[T]` bool, False for padding; None if every token counts or the model got no 2-D attention mask.
        is_recomputation: Whether gradient checkpointing runs this forward a second time, inside the backward.
    """

    layer: MoeLayer
    logits: Tensor | None
    weights: Tensor
    index: Tensor
    mask: Tensor | None
    is_recomputation: bool


@contextmanager
def watch_routing(model: nn.Module, on_routing: Callable[[Routing], None]) -> Iterator[list[MoeLayer]]:
    """While the block runs, call `on_routing` with each decision, before the layer's experts run.

    `model` may be wrapped (PEFT, DDP). The hooks are Python: install them before `torch.compile` first runs the model,
    or the compiled graph leaves them out.

    Yields:
        The layers, in the model's order.

    Raises:
        ValueError: If the model has no MoE layer.
        TypeError: From inside a forward, if a layer's experts get no integer ids.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer to watch. Pass a Mixture-of-Experts model.")
    watch = _Watch(on_routing)
    # not the outermost module: PEFT's generate calls the model that it wraps
    called = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)
    hooks = [called.register_forward_pre_hook(watch.begin, with_kwargs=True)]
    try:
        for layer in layers:
            if layer.router is not None:
                hooks.append(layer.router.register_forward_hook(partial(watch.routed, layer)))
            experts = model.get_submodule(layer.called_experts_name)
            hooks.append(experts.register_forward_pre_hook(partial(watch.called, layer), with_kwargs=True))
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward: gradient checkpointing computes it a second time."""
    return torch._C._current_graph_task_id() != -1


class _Watch:
    """The hooks, and what they remember between the model's call, a router's and its experts'."""

    def __init__(self, on_routing: Callable[[Routing], None]):
        self.on_routing = on_routing
        self.mask_BS: Tensor | None = None
        self.returned: dict[str, Any] = {}

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mask_BS = _attention_mask(model, args, kwargs)

    def routed(self, layer: MoeLayer, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.returned[layer.name] = output

    def called(self, layer: MoeLayer, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        returned = self.returned.pop(layer.name, None)
        index, weights = _decision(layer, args, kwargs, returned)
        if index.dtype.is_floating_point:
            raise TypeError(
                f"the experts of layer {layer.name!r} must be called with (hidden_states, top_k_index, "
                f"top_k_weights), got ids of {index.dtype}."
            )
        self.on_routing(
            Routing(
                layer=layer,
                logits=_logits(returned, len(index)),
                weights=weights.reshape(index.shape),
                index=index,
                mask=_token_mask(self.mask_BS, len(index)),
                is_recomputation=is_recomputation(),
            )
        )


def _decision(layer: MoeLayer, args: Any, kwargs: Any, returned: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights, `[T, K]`."""
    if getattr(layer.experts, "_is_expert_parallel", False) and isinstance(returned, tuple) and len(returned) >= 3:
        weights, index = returned[1], returned[2]
    else:
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
        weights = kwargs["top_k_weights"] if "top_k_weights" in kwargs else args[2]
    return index.reshape(-1, index.shape[-1]), weights


def _logits(returned: Any, num_tokens: int) -> Tensor | None:
    """The first floating-point tensor with a row for each token."""
    candidates = returned if isinstance(returned, tuple) else (returned,)
    for value in candidates:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            flat = value.reshape(-1, value.shape[-1])
            if len(flat) == num_tokens:
                return flat
    return None


def _attention_mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is None and len(args) > 1:
        names = list(inspect.signature(model.forward).parameters)
        position = names.index("attention_mask") if "attention_mask" in names else len(args)
        mask = args[position] if position < len(args) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _token_mask(mask_BS: Tensor | None, num_tokens: int) -> Tensor | None:
    """`[T]` of the tokens of this forward: with a cache the mask also covers the positions before them."""
    if mask_BS is None or mask_BS.shape[0] == 0 or num_tokens % mask_BS.shape[0]:
        return None
    positions = num_tokens // mask_BS.shape[0]
    if positions > mask_BS.shape[1]:
        return None
    return mask_BS[:, mask_BS.shape[1] - positions :].reshape(-1).bool()
