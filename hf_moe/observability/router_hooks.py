"""Hear what every router chooses."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from hf_moe.models.moe_layers import MoeLayer, moe_layers

OnChoice = Callable[[MoeLayer, nn.Module, Tensor], None]


@contextmanager
def watch_choices(model: nn.Module, on_choice: OnChoice) -> Iterator[list[MoeLayer]]:
    """While the block runs, call `on_choice(layer, router, index)` for each forward of each router.

    `index` is int64, shape (tokens, top_k); the id `num_experts` marks a slot without an expert.

    Raises:
        ValueError: If the model has no MoE layer, or one whose block routes by itself.
        TypeError: From inside a forward, if a router does not return `(logits, weights, indices)`.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer to watch. Pass a Mixture-of-Experts model.")
    hooks = []
    try:
        for layer in layers:
            if layer.router is None:
                raise ValueError(f"the block {layer.name!r} routes by itself: it has no router module to watch.")
            hooks.append(layer.router.register_forward_hook(partial(_hand_over, layer, on_choice)))
        yield layers
    finally:
        for hook in hooks:
            hook.remove()


def _hand_over(layer: MoeLayer, on_choice: OnChoice, router: nn.Module, inputs: Any, output: Any) -> None:
    if not isinstance(output, tuple) or len(output) < 3:
        raise TypeError(
            f"router {layer.router_name!r} must return (logits, weights, indices), got {type(output).__name__}: its "
            "block chooses the experts itself, and the choice cannot be watched."
        )
    on_choice(layer, router, output[2].detach())
