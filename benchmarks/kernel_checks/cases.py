"""Launches of every kernel: the combinations of features of each kernel of the tile tables, and of the others.

Shapes are those of a tile table's entry, so that the launcher asks for that entry's tile. A new kernel needs a case
here: the check fails with the names of those that no case launches.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, P pre-activation width, A and B
widths of a product, R LoRA rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_moe.kernels.layer_call import ExpertForm, ExpertWeights, LayerCall
from hf_moe.kernels.triton.backward_activation import launch_backward_activation
from hf_moe.kernels.triton.between_products import (
    launch_activation,
    launch_activation_backward,
    launch_combine_rows,
    launch_gather_rows,
    launch_row_of_slot,
)
from hf_moe.kernels.triton.combine import launch_sum_k
from hf_moe.kernels.triton.decode import launch_decode
from hf_moe.kernels.triton.grouped_linear import LowRankTerm, launch_grouped_linear
from hf_moe.kernels.triton.routing import RowOrder, size_of_maps, sort_rows
from hf_moe.kernels.triton.up import launch_up
from hf_moe.kernels.triton.weight_gradient import launch_bias_gradient, launch_weight_gradient

E, K, R = 64, 8, 16
SWIGLU = ExpertForm("silu")
TRANSPOSED = ExpertForm("silu", transposed=True)
GPT_OSS = ExpertForm("silu", alpha=1.702, limit=7.0, offset=1.0, transposed=True, interleaved=True)
GELU = ExpertForm("gelu")
RELU2 = ExpertForm("relu2", gated=False)


@dataclass(frozen=True)
class Shape:
    """Rows per expert, columns and reduced dimension of a product, as in `tile_for`."""

    rows_per_expert: int
    n: int
    k: int
    dtype: torch.dtype

    @property
    def num_rows(self) -> int:
        return self.rows_per_expert * E

    @property
    def num_tokens(self) -> int:
        return self.num_rows // K

    def tensor(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(sizes, dtype=dtype or self.dtype, device="meta")

    def order(self) -> RowOrder:
        sizes = (self.num_rows, E, size_of_maps(self.num_rows, E))
        return RowOrder(*(self.tensor(size, dtype=torch.int32) for size in sizes))

    def routing_weights(self) -> Tensor:
        return self.tensor(self.num_tokens, K, dtype=torch.float32)


@dataclass(frozen=True)
class Case:
    """One combination of features.

    Attributes:
        every_tile: Whether it needs most registers, so that it is tried with the small tiles too.
        fp8: Whether weights are fp8, for chips that convert it.
    """

    features: str
    launch: Callable[[Shape], Any]
    every_tile: bool = False
    fp8: bool = False


FP8_BLOCK = 128  # rows and columns of a scale in published checkpoints


def weight_of(shape: Shape, rows: int, columns: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """A weight [E, rows, columns] and the scales of its blocks, None for a dense one."""
    if not fp8:
        return shape.tensor(E, rows, columns), None
    grid = (max(1, size // FP8_BLOCK) for size in (rows, columns))
    return shape.tensor(E, rows, columns, dtype=torch.float8_e4m3fn), shape.tensor(E, *grid, dtype=torch.float32)


def pre_width(width: int, form: ExpertForm) -> int:
    return 2 * width if form.gated else width


def up(
    shape: Shape, form: ExpertForm = SWIGLU, *, bias: bool = False, low: bool = False, store_pre: bool = False,
    fp8: bool = False,
) -> None:  # fmt: skip
    width, H = shape.n, shape.k
    P = pre_width(width, form)
    weight, scale = weight_of(shape, *((H, P) if form.transposed else (P, H)), fp8)
    launch_up(
        shape.tensor(shape.num_tokens, H),
        weight,
        shape.order(),
        form,
        top_k=K,
        bias=shape.tensor(E, P) if bias else None,
        store_pre=store_pre,
        term=low_rank_term(shape, P) if low else None,
        scale=scale,
    )


def low_rank_term(shape: Shape, columns: int) -> LowRankTerm:
    return LowRankTerm(shape.tensor(shape.num_rows, R), shape.tensor(E, columns, R))


def grouped_linear(
    shape: Shape, *, transposed: bool = False, gather: bool = False, bias: bool = False, low: bool = False,
    weighted: bool = False, scale: float = 1.0, fp8: bool = False,
) -> None:  # fmt: skip
    weight, weight_scale = weight_of(shape, *((shape.k, shape.n) if transposed else (shape.n, shape.k)), fp8)
    launch_grouped_linear(
        shape.tensor(shape.num_tokens if gather else shape.num_rows, shape.k),
        weight,
        shape.order(),
        top_k=K,
        transposed=transposed,
        gather=gather,
        scatter=weighted,
        bias=shape.tensor(E, shape.n) if bias else None,
        row_weights_N=shape.routing_weights().view(-1) if weighted else None,
        term=low_rank_term(shape, shape.n) if low else None,
        scale=scale,
        weight_scale=weight_scale,
    )


def backward_activation(
    shape: Shape, form: ExpertForm = SWIGLU, *, bias: bool = False, low: bool = False, fp8: bool = False
) -> None:
    width, H = shape.n, shape.k
    weight, scale = weight_of(shape, *((width, H) if form.transposed else (H, width)), fp8)
    down_a = shape.tensor(E, R, width)
    launch_backward_activation(
        shape.tensor(shape.num_tokens, H),
        weight,
        shape.tensor(shape.num_rows, pre_width(width, form)),
        shape.order(),
        shape.routing_weights(),
        form,
        down_bias=shape.tensor(E, H) if bias else None,
        term=LowRankTerm(shape.tensor(shape.num_rows, R), down_a.transpose(1, 2)) if low else None,
        scale=scale,
    )


def weight_gradient(shape: Shape, *, gather_left: bool = False, gather_right: bool = False) -> None:
    A, B = shape.k, shape.n
    launch_weight_gradient(
        shape.tensor(shape.num_tokens if gather_left else shape.num_rows, A),
        shape.tensor(shape.num_tokens if gather_right else shape.num_rows, B),
        shape.order(),
        top_k=K,
        gather_left=gather_left,
        gather_right=gather_right,
        out_dtype=shape.dtype,
    )


def bias_gradient(shape: Shape, *, gather: bool) -> None:
    launch_bias_gradient(
        shape.tensor(shape.num_tokens if gather else shape.num_rows, shape.n),
        shape.order(),
        top_k=K,
        gather=gather,
        out_dtype=shape.dtype,
        row_weights_N=shape.routing_weights().view(-1) if gather else None,
    )


def decode(shape: Shape, form: ExpertForm = SWIGLU, *, bias: bool = False, fp8: bool = False) -> None:
    width, H = shape.k, shape.n
    P = pre_width(width, form)
    up_weight, up_scale = weight_of(shape, *((H, P) if form.transposed else (P, H)), fp8)
    down_weight, down_scale = weight_of(shape, *((width, H) if form.transposed else (H, width)), fp8)
    biases = [shape.tensor(E, size) if bias else None for size in (P, H)]
    experts = ExpertWeights(up_weight, biases[0], down_weight, biases[1], up_scale, down_scale)
    index_TK = shape.tensor(shape.num_tokens, K, dtype=torch.int64)
    launch_decode(LayerCall(shape.tensor(shape.num_tokens, H), index_TK, shape.routing_weights(), experts, E, form))


def routing(shape: Shape, num_experts: int = E, sentinel: bool = True) -> None:
    index_TK = shape.tensor(shape.num_tokens, K, dtype=torch.int64)
    sort_rows(index_TK, num_experts, num_experts + sentinel)


def sum_k(shape: Shape) -> None:
    rows_NH = shape.tensor(shape.num_rows, shape.n)
    index_TK = shape.tensor(shape.num_tokens, K, dtype=torch.int64)
    launch_sum_k(rows_NH, K, shape.dtype, index_TK=index_TK, num_ids=E)
    launch_sum_k(rows_NH, K, shape.dtype, shape.routing_weights())


def between_products(shape: Shape, form: ExpertForm = SWIGLU, *, bias: bool = False) -> None:
    """The kernels around torch's grouped product, forward and backward."""
    order, weights_TK = shape.order(), shape.routing_weights()
    pre_NP = shape.tensor(shape.num_rows, pre_width(shape.k, form))
    values_TH = shape.tensor(shape.num_tokens, shape.n)
    act_NI = launch_activation(pre_NP, order, form, shape.tensor(E, pre_NP.shape[1]) if bias else None)
    launch_combine_rows(
        launch_gather_rows(values_TH, order, K),
        launch_row_of_slot(order),
        K,
        weights_TK=weights_TK if bias else None,
        index_TK=shape.tensor(shape.num_tokens, K, dtype=torch.int64) if bias else None,
        num_ids=E,
        bias=shape.tensor(E, shape.n) if bias else None,
    )
    down_bias = shape.tensor(E, shape.n) if bias else None
    launch_activation_backward(act_NI, pre_NP, values_TH, order, weights_TK, form, down_bias=down_bias)


DECODE = [
    Case("gated", decode, every_tile=True),
    Case("gpt-oss", lambda shape: decode(shape, GPT_OSS, bias=True)),
    Case("transposed", lambda shape: decode(shape, TRANSPOSED)),
    Case("ungated relu2", lambda shape: decode(shape, RELU2)),
    Case("fp8", lambda shape: decode(shape, fp8=True), fp8=True),
]

# by kernel of the tile tables
TILED: dict[str, list[Case]] = {
    "up": [
        Case("training", lambda shape: up(shape, store_pre=True), every_tile=True),
        Case("inference", up),
        Case("gpt-oss, training", lambda shape: up(shape, GPT_OSS, bias=True, store_pre=True)),
        Case("LoRA, training", lambda shape: up(shape, store_pre=True, low=True)),
        # gate and up in an accumulator each
        Case("transposed, training", lambda shape: up(shape, TRANSPOSED, store_pre=True)),
        Case("ungated relu2, training", lambda shape: up(shape, RELU2, store_pre=True)),
        Case("gelu, training", lambda shape: up(shape, GELU, store_pre=True)),
        Case("fp8, LoRA, training", lambda shape: up(shape, store_pre=True, low=True, fp8=True), fp8=True),
    ],
    "grouped_linear": [
        Case("weighted, scattered", lambda shape: grouped_linear(shape, weighted=True), every_tile=True),
        Case("gathered", lambda shape: grouped_linear(shape, gather=True)),
        Case("transposed", lambda shape: grouped_linear(shape, transposed=True)),
        Case(
            "transposed, bias, weighted",
            lambda shape: grouped_linear(shape, transposed=True, bias=True, weighted=True),
        ),
        Case("LoRA, weighted", lambda shape: grouped_linear(shape, low=True, weighted=True)),
        Case("fp8, LoRA, weighted", lambda shape: grouped_linear(shape, low=True, weighted=True, fp8=True), fp8=True),
        Case("fp8, transposed", lambda shape: grouped_linear(shape, transposed=True, fp8=True), fp8=True),
    ],
    "backward_activation": [
        Case("gated", backward_activation, every_tile=True),
        Case("gpt-oss", lambda shape: backward_activation(shape, GPT_OSS, bias=True)),
        Case("LoRA", lambda shape: backward_activation(shape, low=True)),
        Case("ungated relu2", lambda shape: backward_activation(shape, RELU2)),
        Case("gelu", lambda shape: backward_activation(shape, GELU)),
        Case("Mixtral's width", lambda shape: backward_activation(replace(shape, n=14336))),
        Case("fp8, LoRA", lambda shape: backward_activation(shape, low=True, fp8=True), fp8=True),
    ],
    "weight_gradient": [
        Case("right gathered", lambda shape: weight_gradient(shape, gather_right=True), every_tile=True),
        Case("left gathered", lambda shape: weight_gradient(shape, gather_left=True)),
        Case("neither gathered", weight_gradient),
        Case(
            "right gathered, uneven",
            lambda shape: weight_gradient(replace(shape, n=shape.n + 64, k=shape.k + 64), gather_right=True),
        ),
    ],
    "decode_up": DECODE,
    "decode_down": DECODE,
}
# kernels whose sizes are no tile table's
OTHERS: dict[str, list[Case]] = {
    "routing": [
        Case("int64 ids", routing),
        Case("one expert", lambda shape: routing(shape, 1, sentinel=False)),  # Triton makes a 1 a constant
    ],
    "between_products": [
        Case("gated", between_products),
        Case("gpt-oss", lambda shape: between_products(shape, GPT_OSS, bias=True)),
        Case("ungated relu2", lambda shape: between_products(shape, RELU2)),
        Case("gelu", lambda shape: between_products(shape, GELU)),
    ],
    "combine": [Case("sum over slots", sum_k)],
    "bias_gradient": [
        Case("by row", lambda shape: bias_gradient(shape, gather=False)),
        Case("gathered, weighted", lambda shape: bias_gradient(shape, gather=True)),
    ],
}
