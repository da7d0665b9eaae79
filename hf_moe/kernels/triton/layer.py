"""Shared parts of the differentiable ops: their definition, checks, and steps made of several launches.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), A and B the input and output width of a weight, R rank.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer_call import LayerCall
from .combine import launch_sum_k
from .fp8 import SCALES, VALUES
from .grouped_linear import LowRankTerm, launch_grouped_linear
from .routing import RowOrder, size_of_maps
from .weight_gradient import launch_bias_gradient, launch_weight_gradient


class Kept(NamedTuple):
    """The tensors that backward needs beside the arguments: the pre-activation and the order of the rows."""

    pre_NP: Tensor
    order_N: Tensor
    expert_end_E: Tensor
    tile_maps_X: Tensor

    @property
    def order(self) -> RowOrder:
        return RowOrder(self.order_N, self.expert_end_E, self.tile_maps_X)


def gpu_op(name: str, function: Callable, schema: str) -> torch.library.CustomOpDef:
    """Define a custom op that launches on the device of its first tensor: Triton's default is the current device."""

    @functools.wraps(function)
    def on_device_of_first(first: Tensor, *rest):
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return torch.library.custom_op(name, on_device_of_first, mutates_args=(), schema=schema)


def kept_like(call: LayerCall, keep: bool) -> Kept:
    """Memory for what is kept, empty if nothing is."""
    num_rows, num_experts = (call.index_TK.numel(), call.num_experts) if keep else (0, 0)
    pre_NP = call.hidden_TH.new_empty((num_rows, call.pre_width) if keep else 0)
    ints = functools.partial(call.hidden_TH.new_empty, dtype=torch.int32)
    return Kept(pre_NP, ints(num_rows), ints(num_experts), ints(size_of_maps(num_rows, num_experts)))


def require_layer(call: LayerCall) -> None:
    """Refuse tensors whose shapes or dtypes do not fit each other."""
    _require_shapes(call)
    hidden_TH, (up, up_bias, down, down_bias, up_scale, down_scale) = call.hidden_TH, call.experts
    up_factors, down_factors = call.low_rank or (None, None)
    tensors = {"hidden": hidden_TH, "up_bias": up_bias, "down_bias": down_bias}
    if up_scale is None and down_scale is None:
        tensors |= {"up_weight": up, "down_weight": down}
    else:
        require_scales(call)
    for name, factors in (("up", up_factors), ("down", down_factors)):
        tensors |= {} if factors is None else {f"{name}_a": factors.a, f"{name}_b": factors.b}
    require_one_dtype(**tensors)


def require_one_dtype(**tensors: Tensor | None) -> None:
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
        raise ValueError(f"rows, expert weights and biases must have one dtype, got {found}. Cast them to one.")


def require_scales(call: LayerCall) -> None:
    """Refuse scales that do not cut fp8 weights into equal blocks."""
    for name in ("up", "down"):
        weight, scale = getattr(call.experts, name), getattr(call.experts, f"{name}_scale")
        if weight.dtype != VALUES or scale is None or scale.dtype not in SCALES or call.form.transposed:
            raise ValueError(
                f"scales belong to both weights, {VALUES} and not transposed, and are floating or uint8, got {name} "
                f"{weight.dtype}, its scale {None if scale is None else scale.dtype}, transposed="
                f"{call.form.transposed}: give dense weights without scales."
            )
        if (
            scale.dim() != 3
            or len(scale) != len(weight)
            or any(size % max(1, blocks) for size, blocks in zip(weight.shape, scale.shape, strict=True))
        ):
            raise ValueError(
                f"the scales {list(scale.shape)} do not cut {name} {list(weight.shape)} into equal blocks: give "
                "[E, blocks of rows, blocks of columns]."
            )


def require_width(**widths: int) -> None:
    """Refuse matrices without rows or columns: a grid of no programs is an error of the driver."""
    for name, width in widths.items():
        if width < 1:
            raise ValueError(f"{name} must be at least 1, got {width}: give the layer one.")


def require_span(**weights: Tensor) -> None:
    """Refuse matrices of which one is spread over more memory than an int32 counts: some offsets are of that type."""
    for name, weight in weights.items():
        pairs = zip(weight.shape[1:], weight.stride()[1:], strict=True)
        if (span := sum((size - 1) * stride for size, stride in pairs)) >= 2**31:
            raise ValueError(
                f"a matrix of {name} may be spread over 2^31 elements at most, got {span + 1} by strides "
                f"{weight.stride()}: call contiguous()."
            )


def _require_shapes(call: LayerCall) -> None:
    hidden_TH, index_TK, weights_TK, (up, _, down, *_), _, form, _ = call
    if hidden_TH.dim() != 2 or index_TK.dim() != 2 or index_TK.shape != weights_TK.shape:
        shapes = tuple(tuple(tensor.shape) for tensor in (hidden_TH, index_TK, weights_TK))
        raise ValueError(f"hidden [T, H], index [T, K] and weights [T, K] are needed, got {shapes}.")
    dims = (0, 2, 1) if form.transposed else (0, 1, 2)
    (E, P, H), (_, _, width) = up.permute(dims).shape, down.permute(dims).shape
    if hidden_TH.shape[1] != H or width * (1 + form.gated) != P or down.permute(dims).shape != (E, H, width):
        raise ValueError(
            f"Expert weights {tuple(up.shape)} and {tuple(down.shape)} do not fit hidden size {hidden_TH.shape[1]}, "
            f"gated={form.gated}, transposed={form.transposed}: [E, P, H] and [E, H, I] are needed, or with "
            "transposed [E, H, P] and [E, I, H], where P is 2I if gated."
        )
    require_width(hidden_size=H, expert_width=width)
    require_span(up_weight=up, down_weight=down)


def project_down(act_NI: Tensor, call: LayerCall, order: RowOrder, term: LowRankTerm | None = None) -> Tensor:
    """Down projection of rows in expert order, with an adapter's part, and weighted sum over every token's slots.

    NaN for tokens with an id that is not in [0, num_ids).
    """
    top_k = call.top_k
    rows_NH = launch_grouped_linear(
        act_NI,
        call.experts.down,
        order,
        top_k=top_k,
        transposed=call.form.transposed,
        bias=call.experts.down_bias,
        scatter=True,
        row_weights_N=call.weights_TK.reshape(-1),
        term=term,
        weight_scale=call.experts.down_scale,
    )
    return launch_sum_k(rows_NH, top_k, act_NI.dtype, index_TK=call.index_TK, num_ids=call.num_ids)


def hidden_gradient(grad_pre_NP: Tensor, call: LayerCall, order: RowOrder, term: LowRankTerm | None = None) -> Tensor:
    """grad_pre @ up_weight, with an adapter's part, summed over every token's slots."""
    top_k, transposed = call.top_k, not call.form.transposed
    rows_NH = launch_grouped_linear(
        grad_pre_NP,
        call.experts.up,
        order,
        top_k=top_k,
        transposed=transposed,
        scatter=True,
        term=term,
        weight_scale=call.experts.up_scale,
    )
    return launch_sum_k(rows_NH, top_k, grad_pre_NP.dtype)


def weight_gradient(
    out_rows: Tensor, in_rows: Tensor, order: RowOrder, top_k: int, by_token: str = "", transposed: bool = False
) -> Tensor:
    """Gradient [E, B, A] of a weight ([E, A, B] if transposed) from gradients of its outputs and its inputs.

    by_token: "out" or "in", whichever rows are given by token instead of in expert order.
    """
    sides = {"out": out_rows, "in": in_rows}
    left, right = ("in", "out") if transposed else ("out", "in")
    gathered = {"gather_left": by_token == left, "gather_right": by_token == right}
    return launch_weight_gradient(sides[left], sides[right], order, top_k=top_k, out_dtype=out_rows.dtype, **gathered)


def bias_gradient(rows: Tensor, order: RowOrder, top_k: int, weights_TK: Tensor | None = None) -> Tensor:
    """Sum [E, B] of every expert's rows; with routing weights, of rows by token times their weights."""
    row_weights_N = None if weights_TK is None else weights_TK.reshape(-1).contiguous()
    gather = weights_TK is not None
    return launch_bias_gradient(
        rows, order, top_k=top_k, gather=gather, out_dtype=rows.dtype, row_weights_N=row_weights_N
    )
