"""One call of a layer of experts, from the pipeline to a fused operator, and its flat form: arguments of torch ops.

Shape suffixes: T tokens, K slots per token, E experts, H hidden, I expert width, P pre-activation width (2I gated, I
ungated), R rank.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class ExpertWeights(NamedTuple):
    """The tensors of the experts, of one floating dtype, any strides; with scales, matrices are float8_e4m3fn.

    Attributes:
        up: `[E, P, H]`, or `[E, H, P]` in a transposed layout.
        up_bias: `[E, P]`.
        down: `[E, H, I]`, or `[E, I, H]` in a transposed layout.
        down_bias: `[E, H]`.
        up_scale: `[E, X, Y]`, one for each block of `P / X` by `H / Y` values of `up`, whose weights are the products,
            rounded to the dtype of the rows. Floating, or the bytes of float8_e8m0fnu; not in a transposed layout.
        down_scale: Likewise; of both matrices or of none.
    """

    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None


class ExpertForm(NamedTuple):
    """The form of an expert: its activation between the two products, and the layout of its matrices.

    Gated: `(clamp(up, -limit, limit) + offset) * f(min(gate, limit))`, with `alpha` the slope of silu's sigmoid.
    Ungated: `f(pre)`.

    Attributes:
        activation: f: silu, gelu (erf), gelu_tanh, relu or relu2.
        gated: Whether the pre-activations are gate and up: P is 2I.
        transposed: Whether the matrices are stored `[E, in, out]`.
        interleaved: Whether gate and up are the even and odd columns of P instead of its halves.
    """

    activation: str
    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False


class LowRank(NamedTuple):
    """An adapter's addition to the weight of every expert, `scale * b @ a`, as its factors.

    Attributes:
        a: `[E, R, in]`: in is H for the up projection, I for the down projection; any strides.
        b: `[E, out, R]`: out is P for the up projection, H for the down projection; any strides.
        scale: Of the product.
    """

    a: Tensor
    b: Tensor
    scale: float

    def to(self, dtype: torch.dtype) -> "LowRank":
        # PEFT's b has the expert fastest. A GPU's kernels want its rows, which a cast brings for nothing; those of the
        # CPU read any strides.
        layout = torch.preserve_format if self.b.device.type == "cpu" else torch.contiguous_format
        return LowRank(self.a.to(dtype), self.b.to(dtype, memory_format=layout), self.scale)

    def contiguous(self) -> "LowRank":
        return LowRank(self.a.contiguous(), self.b.contiguous(), self.scale)


class LowRankPair(NamedTuple):
    """The adapters of one layer's projections, each with a rank of its own; None adds nothing."""

    up: LowRank | None
    down: LowRank | None

    def to(self, dtype: torch.dtype) -> "LowRankPair":
        return self._each(lambda factors: factors.to(dtype))

    def contiguous(self) -> "LowRankPair":
        return self._each(LowRank.contiguous)

    def _each(self, change: Callable[[LowRank], LowRank]) -> "LowRankPair":
        up, down = (None if factors is None else change(factors) for factors in self)
        return LowRankPair(up, down)


class LayerCall(NamedTuple):
    """Everything that a fused operator of a layer reads.

    Attributes:
        hidden_TH: In the dtype of the weights.
        index_TK: int32 or int64 ids in `[0, num_ids)`; the id E marks a slot that computes nothing.
        weights_TK: Routing weights, of any floating dtype.
        experts: Their tensors; for another format than dense, what its storage and its operators agree on.
        num_ids: E, or E + 1 where slots without an expert are allowed.
        form: How they compute.
        low_rank: Adapters over them, in their dtype; the base is then frozen.
    """

    hidden_TH: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    experts: ExpertWeights
    num_ids: int
    form: ExpertForm
    low_rank: LowRankPair | None = None

    @property
    def num_experts(self) -> int:
        return self.experts.up.shape[0]

    @property
    def pre_width(self) -> int:
        """P."""
        return self.experts.up.shape[2 if self.form.transposed else 1]

    @property
    def top_k(self) -> int:
        """K."""
        return self.index_TK.shape[1]


# What a torch op that takes a call declares, in the order of `flatten`: all tensors, then all settings.
_TENSORS = (
    "Tensor hidden, Tensor index, Tensor weights, Tensor up_weight, Tensor? up_bias, Tensor down_weight, "
    "Tensor? down_bias"
)
_SETTINGS = (
    "int num_ids, str activation, float alpha, float limit, float offset, bool gated, bool transposed, "
    "bool interleaved"
)
_SCALES = "Tensor? up_weight_scale, Tensor? down_weight_scale"
_FACTORS = "Tensor? up_a, Tensor? up_b, Tensor? down_a, Tensor? down_b"
# without scales: operators of dense weights alone
DENSE_CALL = f"{_TENSORS}, {_SETTINGS}"
DENSE_ADAPTED_CALL = f"{_TENSORS}, {_FACTORS}, {_SETTINGS}, float up_scale, float down_scale"
CALL = DENSE_CALL.replace(_TENSORS, f"{_TENSORS}, {_SCALES}")
ADAPTED_CALL = DENSE_ADAPTED_CALL.replace(_TENSORS, f"{_TENSORS}, {_SCALES}")

NO_FP8_GRADIENT = "weights in fp8 have no gradient: call requires_grad_(False) on them, and train adapters."

_NUM_ARGUMENTS = CALL.count(",") + 1
_ABSENT = (None, None, 1.0)


def flatten(call: LayerCall) -> tuple:
    """The arguments that CALL declares; with adapters, be it of one projection only, those of ADAPTED_CALL."""
    hidden_TH, index_TK, weights_TK, experts, num_ids, form, low_rank = call
    if low_rank is None:
        return (hidden_TH, index_TK, weights_TK, *experts, num_ids, *form)
    (up_a, up_b, up_scale), (down_a, down_b, down_scale) = low_rank.up or _ABSENT, low_rank.down or _ABSENT
    factors = (up_a, up_b, down_a, down_b)
    return (hidden_TH, index_TK, weights_TK, *experts, *factors, num_ids, *form, up_scale, down_scale)


def flatten_dense(call: LayerCall) -> tuple:
    """The arguments that DENSE_CALL or DENSE_ADAPTED_CALL declares, of a call without scales."""
    flat = flatten(call)
    return (*flat[:7], *flat[9:])


def unflatten(flat: Sequence) -> LayerCall:
    """The call whose `flatten` is `flat`."""
    hidden_TH, index_TK, weights_TK = flat[:3]
    experts = ExpertWeights(*flat[3:9])
    if len(flat) == _NUM_ARGUMENTS:
        return LayerCall(hidden_TH, index_TK, weights_TK, experts, flat[9], ExpertForm(*flat[10:]))
    up_a, up_b, down_a, down_b, num_ids = flat[9:14]
    *form, up_scale, down_scale = flat[14:]
    low_rank = LowRankPair(_low_rank(up_a, up_b, up_scale), _low_rank(down_a, down_b, down_scale))
    return LayerCall(hidden_TH, index_TK, weights_TK, experts, num_ids, ExpertForm(*form), low_rank)


def _low_rank(a: Tensor | None, b: Tensor | None, scale: float) -> LowRank | None:
    return None if a is None and b is None else LowRank(a, b, scale)  # type: ignore[arg-type]
