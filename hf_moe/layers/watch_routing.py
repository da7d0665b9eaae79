"""Watch every routing decision of a model while it runs, whatever the family, the backend, and what wraps it.

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
from transformers import Cache

from hf_moe.layers.moe_layers import MoeLayer, inner_model
from hf_moe.layers.skipped_slots import is_expert_parallel, may_skip_slots
from hf_moe.layers.unseen_experts import required_layers
from hf_moe.models.transformers_names import CACHE_NAMES


@dataclass(frozen=True, eq=False)
class ModelCall:
    """What the model was called with; the same object for all layers of a forward.

    Attributes:
        input_ids: `[B, S]`, None if it was called with embeddings.
        shape: `(B, S)`, None if neither ids nor embeddings were found.
        mask: `[B, P + S]` bool, False for padding; P positions are in a cache. None without a 2-D attention mask.
        cached: P, positions that the model saw in earlier calls and keeps in a cache.
        has_grad: Whether gradients were enabled; inside of gradient checkpointing the layers may not tell.
    """

    input_ids: Tensor | None
    shape: tuple[int, int] | None
    mask: Tensor | None
    cached: int
    has_grad: bool

    def token_mask(self, num_tokens: int) -> Tensor | None:
        """`[T]`, of the tokens of this call; None for layers that see other rows than the tokens."""
        if self.mask is None or self.shape is None or num_tokens != self.shape[0] * self.shape[1]:
            return None
        return self.mask[:, self.mask.shape[1] - self.shape[1] :].reshape(-1)


@dataclass(frozen=True)
class Routing:
    """One forward of one MoE layer: what its router decided. The tensors are the live ones, with their gradient.

    Attributes:
        layer: The layer.
        logits: `[T, X]`, what the router returned first; raw logits in nearly all families, probabilities in some
            (`hf_moe.layers.router_scores` tells). None if the router returned no such tensor.
        weights: `[T, K]`, the weights of the experts' outputs.
        index: `[T, K]`, integer ids; `num_experts` (of the layer) marks a slot without an expert: a null expert, an
            assignment dropped over capacity.
        mask: `[T]` bool, False for padding; None if every token counts or the model got no 2-D attention mask.
        is_recomputation: Whether gradient checkpointing runs this forward a second time, inside the backward.
        choice: `[T, K]`, what an hf_moe router chose before capacity dropped any: ids in `[num_experts, X)` are null
            experts, X is an unused slot. None for other routers.
        call: What the model was called with, None if its forward was entered in another way.
    """

    layer: MoeLayer
    logits: Tensor | None
    weights: Tensor
    index: Tensor
    mask: Tensor | None
    is_recomputation: bool
    choice: Tensor | None = None
    call: ModelCall | None = None


# what `on_routing` may return
Instead = tuple[Tensor, Tensor] | Callable[[Tensor], Tensor]


@contextmanager
def watch_routing(
    model: nn.Module, on_routing: Callable[[Routing], Instead | None], *, layers: list[MoeLayer] | None = None
) -> Iterator[list[MoeLayer]]:
    """While the block runs, call `on_routing` with each decision, before the layer's experts run.

    If it returns `(index, weights)`, both `[T, K]`, the experts get these instead; the router's own output stays. If
    it returns a function, the experts get the hidden states that the function makes of theirs.

    `model` may be wrapped (PEFT, DDP). The hooks are Python: install them before `torch.compile` first runs the model,
    or the compiled graph leaves them out.

    Args:
        layers: What `moe_layers(model)` returned, not empty; found here if not given.

    Yields:
        The layers, in the model's order.

    Raises:
        ValueError: If the model has no MoE layer.
        TypeError: From inside a forward, if a layer's experts get no integer ids.
    """
    layers = required_layers(model) if layers is None else layers
    watch = _Watch(on_routing)
    # not the outermost module: PEFT's generate calls the model that it wraps
    called = inner_model(model)
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

    def __init__(self, on_routing: Callable[[Routing], Instead | None]):
        self.on_routing = on_routing
        self.call: ModelCall | None = None
        self.returned: dict[str, Any] = {}

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.call = _model_call(model, args, kwargs)

    def routed(self, layer: MoeLayer, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.returned[layer.name] = output

    def called(
        self, layer: MoeLayer, experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        returned = self.returned.pop(layer.name, None)
        index, weights = _decision(layer, args, kwargs, returned)
        if index.dtype.is_floating_point:
            raise TypeError(
                f"the experts of layer {layer.name!r} must be called with (hidden_states, top_k_index, "
                f"top_k_weights), got ids of {index.dtype}."
            )
        instead = self.on_routing(
            Routing(
                layer=layer,
                logits=_logits(layer, returned, len(index)),
                weights=weights.reshape(index.shape),
                index=index,
                mask=None if self.call is None else self.call.token_mask(len(index)),
                is_recomputation=is_recomputation(),
                choice=getattr(returned[3], "choice", None) if _is_long(returned, 4) else None,
                call=self.call,
            )
        )
        if instead is None:
            return None
        return _with(layer, instead, args, kwargs) if isinstance(instead, tuple) else _passed(instead, args, kwargs)


def _decision(layer: MoeLayer, args: Any, kwargs: Any, returned: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights, `[T, K]`."""
    index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
    weights = kwargs["top_k_weights"] if "top_k_weights" in kwargs else args[2]
    index = index.reshape(-1, index.shape[-1])
    if may_skip_slots(layer.experts) and _is_long(returned, 3):
        is_packed = index.shape != returned[2].shape
        if is_packed or is_expert_parallel(layer.experts, layer.router):
            return returned[2], returned[1]
    return index, weights


def _is_long(returned: Any, length: int) -> bool:
    return isinstance(returned, tuple) and len(returned) >= length


def _with(
    layer: MoeLayer, instead: tuple[Tensor, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The experts' arguments with other ids and weights, in the shape and the dtype of those that they replace."""
    args_list, kwargs = list(args), dict(kwargs)
    for position, name, value in zip((1, 2), ("top_k_index", "top_k_weights"), instead, strict=True):
        old = kwargs[name] if name in kwargs else args[position]
        if value.numel() != old.numel() or is_expert_parallel(layer.experts, layer.router):
            raise ValueError(
                f"the experts of layer {layer.name!r} are called with {name} of shape {list(old.shape)}, not with one "
                "row for each token (expert parallelism, or experts that choose their tokens): their routing cannot "
                "be replaced."
            )
        value = value.reshape(old.shape).to(old.dtype)
        if name in kwargs:
            kwargs[name] = value
        else:
            args_list[position] = value
    return tuple(args_list), kwargs


def _passed(
    function: Callable[[Tensor], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The experts' arguments with hidden states that went through `function`."""
    if args:
        return (function(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": function(kwargs["hidden_states"])}


def _logits(layer: MoeLayer, returned: Any, num_tokens: int) -> Tensor | None:
    """The first floating-point tensor with a row for each token and a column for each expert, at least."""
    candidates = returned if isinstance(returned, tuple) else (returned,)
    for value in candidates:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            flat = value.reshape(-1, value.shape[-1])
            if len(flat) == num_tokens and flat.shape[-1] >= layer.num_experts:
                return flat
    return None


def _model_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModelCall:
    ids, embeddings, mask = (
        _argument(model, name, args, kwargs) for name in ("input_ids", "inputs_embeds", "attention_mask")
    )
    caches = (_argument(model, name, args, kwargs) for name in (*CACHE_NAMES, "cache_params"))
    cache = next((value for value in caches if isinstance(value, Cache)), None)
    given = ids if isinstance(ids, Tensor) and ids.dim() == 2 else embeddings
    shape = (given.shape[0], given.shape[1]) if isinstance(given, Tensor) and given.dim() >= 2 else None
    if not (isinstance(mask, Tensor) and mask.dim() == 2 and shape is not None and mask.shape[1] >= shape[1]):
        mask = None
    if mask is not None and shape is not None:
        cached = mask.shape[1] - shape[1]
    else:
        # a cache that the model has just begun to fill counts none
        cached = 0 if cache is None else int(cache.get_seq_length())
    return ModelCall(
        input_ids=given if given is ids else None,
        shape=shape,
        mask=None if mask is None else mask.bool(),
        cached=cached,
        has_grad=torch.is_grad_enabled(),
    )


def _argument(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if name in kwargs or not args:
        return kwargs.get(name)
    names = list(inspect.signature(model.forward).parameters)
    position = names.index(name) if name in names else len(args)
    return args[position] if position < len(args) else None
