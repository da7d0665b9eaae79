"""What the differentiable ops share: how an expert computes, checks, and the steps made of several launches.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), R rank.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .combine import launch_sum_k
from .grouped_linear import launch_grouped_linear
from .routing import RowOrder
from .weight_gradient import launch_bias_gradient, launch_weight_gradient

# Pieces of the ops' schemas
GATE = "str activation, float alpha, float limit, float offset, bool gated, bool transposed, bool interleaved"
LAYER = (
    "Tensor hidden, Tensor index, Tensor weights, Tensor up_weight, Tensor? up_bias, Tensor down_weight, "
    "Tensor? down_bias"
)
SAVED = "Tensor hidden, Tensor weights, Tensor up_weight, Tensor down_weight, Tensor? down_bias, Tensor pre"
ORDER = "Tensor order, Tensor expert_end"


class Gate(NamedTuple):
    """How an expert computes, as the launchers take it."""

    activation: str
    alpha: float
    limit: float
    offset: float
    gated: bool
    transposed: bool
    interleaved: bool


def gpu_op(name: str, schema: str) -> Callable[[Callable], torch.library.CustomOpDef]:
    """Define a custom op that launches on the device of its first tensor: Triton's default is the current device."""

    def define(function: Callable) -> torch.library.CustomOpDef:
        @functools.wraps(function)
        def on_device_of_first(first: Tensor, *rest):
            with torch.cuda.device_of(first):
                return function(first, *rest)

        return torch.library.custom_op(name, on_device_of_first, mutates_args=(), schema=schema)

    return define


def like_wanted(tensors: Iterable[Tensor | None], wants: Iterable[bool]) -> list[Tensor]:
    pairs = zip(tensors, wants, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, wanted in pairs if wanted and tensor is not None]


def placed(gradients: Sequence[Tensor], wants: Iterable[bool]) -> list[Tensor | None]:
    """The gradients at the places of what was wanted, None elsewhere."""
    found = iter(gradients)
    return [next(found) if wanted else None for wanted in wants]


def require_one_dtype(**tensors: Tensor | None) -> None:
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in dtypes.items())
        raise ValueError(f"rows, expert weights and biases must have one dtype, got {found}. Cast them to one.")


def require_width(**widths: int) -> None:
    """Refuse matrices without rows or columns: a grid of no programs is an error of the driver."""
    for name, width in widths.items():
        if width < 1:
            raise ValueError(f"{name} must be at least 1, got {width}: give the layer one.")


def require_shapes(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, up: Tensor, down: Tensor, gate: Gate):
    if hidden_TH.dim() != 2 or index_TK.dim() != 2 or index_TK.shape != weights_TK.shape:
        shapes = tuple(tuple(tensor.shape) for tensor in (hidden_TH, index_TK, weights_TK))
        raise ValueError(f"hidden [T, H], index [T, K] and weights [T, K] are needed, got {shapes}.")
    dims = (0, 2, 1) if gate.transposed else (0, 1, 2)
    (E, P, H), (_, _, width) = up.permute(dims).shape, down.permute(dims).shape
    if hidden_TH.shape[1] != H or width * (1 + gate.gated) != P or down.permute(dims).shape != (E, H, width):
        raise ValueError(
            f"Expert weights {tuple(up.shape)} and {tuple(down.shape)} do not fit hidden size {hidden_TH.shape[1]}, "
            f"gated={gate.gated}, transposed={gate.transposed}: [E, P, H] and [E, H, I] are needed, or with "
            "transposed [E, H, P] and [E, I, H], where P is 2I if gated."
        )
    require_width(hidden_size=H, expert_width=width)


def differentiates(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def nothing_kept(like: Tensor) -> tuple[Tensor, RowOrder]:
    """In place of the pre-activation and the order."""
    return like.new_empty(0), RowOrder(*(like.new_empty(0, dtype=torch.int32) for _ in range(2)))


def kept_shapes(hidden_TH: Tensor, index_TK: Tensor, up_weight: Tensor, keep: bool, transposed: bool):
    """pre_NP and the order of an op that is traced, not run."""
    if not keep:
        pre_NP, order = nothing_kept(hidden_TH)
        return pre_NP, *order
    num_rows, P = index_TK.numel(), up_weight.shape[2 if transposed else 1]
    expert_end_E = hidden_TH.new_empty(up_weight.shape[0], dtype=torch.int32)
    return hidden_TH.new_empty(num_rows, P), hidden_TH.new_empty(num_rows, dtype=torch.int32), expert_end_E


def require_kept(keep: bool) -> None:
    if not keep:
        raise RuntimeError(
            "This op keeps nothing for backward with keep=False: call it with keep=True, or in no_grad."
        )


def project_down(
    act_NI: Tensor,
    weights_TK: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    order: RowOrder,
    transposed: bool,
    low_NR: Tensor | None = None,
    down_b: Tensor | None = None,
) -> Tensor:
    """Down projection of rows in expert order, with an adapter's part, and weighted sum over every token's slots."""
    top_k = weights_TK.shape[1]
    rows_NH = launch_grouped_linear(
        act_NI,
        down_weight,
        order,
        top_k=top_k,
        transposed=transposed,
        bias=down_bias,
        scatter=True,
        row_weights_N=weights_TK.reshape(-1),
        low=low_NR,
        low_weight=down_b,
    )
    return launch_sum_k(rows_NH, top_k, act_NI.dtype)


def hidden_gradient(
    grad_pre_NP: Tensor,
    up_weight: Tensor,
    order: RowOrder,
    top_k: int,
    transposed: bool,
    low_NR: Tensor | None = None,
    up_a: Tensor | None = None,
) -> Tensor:
    """grad_pre @ up_weight, with an adapter's part, summed over every token's slots."""
    rows_NH = launch_grouped_linear(
        grad_pre_NP,
        up_weight,
        order,
        top_k=top_k,
        transposed=not transposed,
        scatter=True,
        low=low_NR,
        low_weight=None if up_a is None else up_a.transpose(1, 2),
    )
    return launch_sum_k(rows_NH, top_k, grad_pre_NP.dtype)


def weight_gradient(
    out_rows: Tensor, in_rows: Tensor, order: RowOrder, top_k: int, by_token: str = "", transposed: bool = False
) -> Tensor:
    """Gradient [E, out, in] of a weight ([E, in, out] if transposed) from gradients of its outputs and its inputs.

    by_token: "out" or "in", whichever rows are given by token instead of in expert order.
    """
    sides = {"out": out_rows, "in": in_rows}
    left, right = ("in", "out") if transposed else ("out", "in")
    return launch_weight_gradient(
        sides[left],
        sides[right],
        order,
        order.expert_end_E.numel(),
        top_k=top_k,
        gather_left=by_token == left,
        gather_right=by_token == right,
        out_dtype=out_rows.dtype,
    )


def bias_gradient(rows: Tensor, order: RowOrder, top_k: int, weights_TK: Tensor | None = None) -> Tensor:
    """Sum [E, B] of every expert's rows; with routing weights, of rows by token times their weights."""
    return launch_bias_gradient(
        rows,
        order,
        order.expert_end_E.numel(),
        top_k=top_k,
        gather=weights_TK is not None,
        out_dtype=rows.dtype,
        row_weights_N=None if weights_TK is None else weights_TK.reshape(-1),
    )
