"""Switch experts off while a model runs, to see what is lost without them.

The router's logits of the masked experts become minus infinity before it chooses, so every family follows its own
rule: another expert takes the slot, and where the rule normalises, the weights add up as before. That is what pruning
the expert would do. A router that adds a bias for the choice alone may still pick a masked expert, with the score 0
and therefore the weight 0: the token then uses one expert less. Every forward checks that no masked expert had weight.

Shape suffixes: T tokens, K slots per token.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.watch_routing import Routing, watch_routing

PRODUCTS = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


class MaskError(RuntimeError):
    """A router that still gives weight to a masked expert."""


@contextmanager
def mask_experts(model: nn.Module, masked: Mapping[str, Collection[int]]) -> Iterator[None]:
    """Let no token use these experts while the block runs.

    Args:
        masked: Expert ids by the name of their MoE layer (`hf_moe.moe_layers`).

    Raises:
        ValueError: For an unknown layer or id, or if a layer keeps no expert.
        MaskError: From inside a forward, if the router gave a masked expert weight all the same: it does not
            choose by logits (a table, a product of its own).
    """
    ids = {name: frozenset(chosen) for name, chosen in masked.items() if chosen}
    with ExitStack() as stack:
        layers = {layer.name: layer for layer in stack.enter_context(watch_routing(model, partial(_check, ids)))}
        for name, chosen in ids.items():
            _refuse(layers, name, chosen)
            _mask_router(stack, layers[name], chosen)
        yield


def _refuse(layers: Mapping[str, MoeLayer], name: str, chosen: frozenset[int]) -> None:
    if name not in layers:
        raise ValueError(f"no MoE layer is called {name!r}. The model has {', '.join(layers)}.")
    layer = layers[name]
    if layer.router is None:
        raise ValueError(f"the block {name!r} routes by itself: it has no router whose logits could be masked.")
    if not all(0 <= expert < layer.num_experts for expert in chosen):
        raise ValueError(f"experts of {name!r} have ids in [0, {layer.num_experts - 1}], got {sorted(chosen)}.")
    if len(chosen) == layer.num_experts:
        raise ValueError(f"all {layer.num_experts} experts of {name!r} are masked. Leave at least one.")


def _mask_router(stack: ExitStack, layer: MoeLayer, chosen: frozenset[int]) -> None:
    assert layer.router is not None
    mode = _MaskLogits(_logit_columns(layer), sorted(chosen))
    begin = layer.router.register_forward_pre_hook(lambda module, args: mode.__enter__() and None)
    # also after an error inside the router: a mode that stays on would mask whatever comes next
    end = layer.router.register_forward_hook(lambda module, args, output: mode.leave(), always_call=True)
    for hook in (begin, end):
        stack.callback(hook.remove)


def _logit_columns(layer: MoeLayer) -> frozenset[int]:
    """Columns that the router's logits may have: with null experts the weight has more rows than there are experts."""
    weight = getattr(layer.router, "weight", None)
    own = {weight.shape[0]} if isinstance(weight, Tensor) and weight.dim() == 2 else set()
    return frozenset({layer.num_experts} | {rows for rows in own if rows > layer.num_experts})


class _MaskLogits(TorchFunctionMode):
    """Minus infinity in some columns of every product that has as many columns as the router scores experts."""

    def __init__(self, columns: frozenset[int], chosen: list[int]):
        super().__init__()
        self.columns, self.chosen = columns, chosen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in PRODUCTS and result.shape[-1] in self.columns:
            return result.index_fill(-1, torch.tensor(self.chosen, device=result.device), -torch.inf)
        return result

    def leave(self) -> None:
        self.__exit__(None, None, None)


def _check(ids: Mapping[str, frozenset[int]], routing: Routing) -> None:
    chosen = ids.get(routing.layer.name)
    if not chosen:
        return
    is_masked_TK = torch.isin(routing.index, torch.tensor(sorted(chosen), device=routing.index.device))
    # not `!= 0`: NaN must not pass
    if not bool((routing.weights[is_masked_TK] == 0).all()):
        raise MaskError(
            f"the router of {routing.layer.name!r} ({routing.layer.router_name}) still gives weight to a masked "
            "expert: it does not choose by logits that can be masked. Leave out --mask-experts for this model."
        )
