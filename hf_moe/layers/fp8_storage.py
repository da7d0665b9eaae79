"""Storage of experts in fp8: e4m3 values with inverse scales by block, by row or by half, as transformers stores them.

Transformers' fp8 backends round the rows to 8 bits as well, by scales of a batch or of the checkpoint. Here rows keep
16 bits and such scales are not read, as with `FineGrainedFP8Config(dequantize=True)`: a weight is its value times its
scale, in float32, rounded once to the dtype of the rows. Only experts that have rows are unpacked.

Source: transformers 5.17 to 5.24, `integrations/finegrained_fp8.py` (`FP8Experts`, `Fp8Dequantize`).

Shape suffixes: E experts, B and A the widths that a projection maps from and to, X and Y a grid of scales over them.
"""

from collections.abc import Iterator
from math import ceil, gcd
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_moe.kernels.layer_call import NO_FP8_GRADIENT, ExpertWeights
from hf_moe.layers.expert_rows import Plan, Projection, linear_by_expert
from hf_moe.layers.geometry import projection_name
from hf_moe.layers.packed_storages import OwnWeights, UnreadableStorage

SCALE = "_scale_inv"
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
WAY_OUT = "load the model with FineGrainedFP8Config(dequantize=True)"
# families whose experts compute what FP8Experts, which stands in their place, does not
OTHERWISE = {
    "gpt_oss": "interleaved columns and biases",
    "openai_privacy_filter": "biases",
    "aria_text": "a transposed layout",
    "muse_spark_text": "a norm after each expert",
    "step3p5": "limits that differ by layer",
}


def is_scaled(experts: Any) -> bool:
    """Whether scales lie beside the weights of an experts module."""
    # a parametrisation takes the weight away, not its scale
    return f"down_proj{SCALE}" in experts._parameters


def fp8_storage(experts: Any) -> "Fp8Storage | UnreadableStorage":
    """The storage of weights that have scales; of a form not known here, one that says why it multiplies nothing."""
    weight = experts._parameters.get("down_proj")
    family = getattr(experts.config, "model_type", "")
    if family in OTHERWISE:
        return UnreadableStorage(
            experts, weight, f"fp8 experts of {family} lack what it computes with, {OTHERWISE[family]}: {WAY_OUT}."
        )
    grids = {}
    for projection in ("up", "down"):
        name = projection_name(experts, projection)
        values, scale = (experts._parameters.get(each) for each in (name, name + SCALE))
        grid = _grid(values, scale, getattr(experts, "block_size", None), projection == "up" and experts.has_gate)
        if isinstance(grid, str):
            return UnreadableStorage(experts, weight, f"{name} is {grid}, which hf_moe does not read: {WAY_OUT}.")
        grids[projection] = (values, grid)
    return Fp8Storage(experts, grids)


class Fp8Storage(OwnWeights):
    """Frozen values of 8 bits.

    Args:
        grids: By projection, values `[E, B, A]` and scales `[E, X, Y]`, one for each `B / X` rows and `A / Y` columns;
            powers of two are the bytes of float8_e8m0fnu, with which torch does little else than convert them.
    """

    format = "fp8"

    def __init__(self, experts: Any, grids: dict[str, tuple[Tensor, Tensor]]):
        super().__init__(experts)
        self.grids = grids

    @property
    def dtype(self) -> torch.dtype:
        """Of the model, as its config has it: nothing in the module tells."""
        declared = getattr(self.experts.config, "dtype", None)
        declared = getattr(torch, declared, None) if isinstance(declared, str) else declared
        return declared if isinstance(declared, torch.dtype) and declared.itemsize > 1 else torch.bfloat16

    @property
    def device(self) -> torch.device:
        return self.grids["down"][0].device

    def linear(self, rows_NA: Tensor, projection: Projection, plan: Plan) -> Tensor:
        values, scale = self.grids[projection]
        dtype = self.dtype

        def matrices(experts: list[int]) -> Iterator[Tensor]:
            for expert in experts:
                yield dequantise(values[expert], scale[expert], dtype)

        if torch.is_grad_enabled() and values.requires_grad:
            rows_NA = _NoGradient.apply(rows_NA, values)
        return linear_by_expert(rows_NA, plan, matrices, values.shape[1])

    def operands(self) -> ExpertWeights:
        (up, up_scale), (down, down_scale) = self.grids["up"], self.grids["down"]
        return ExpertWeights(up, None, down, None, up_scale, down_scale)


@torch.no_grad()
def dequantise(values_BA: Tensor, scale_XY: Tensor, dtype: torch.dtype) -> Tensor:
    """Values times the scale of their block, multiplied in float32 and rounded once; leading dimensions are kept."""
    (B, A), (X, Y) = values_BA.shape[-2:], scale_XY.shape[-2:]
    scale_XY = scale_XY.view(torch.float8_e8m0fnu) if scale_XY.dtype == torch.uint8 else scale_XY
    blocks = values_BA.float().unflatten(-1, (Y, A // Y)).unflatten(-3, (X, B // X))
    return (blocks * scale_XY.float()[..., :, None, :, None]).to(dtype).view(values_BA.shape)


class _NoGradient(torch.autograd.Function):
    """The rows as they are; a backward that wants the gradient of the values fails."""

    @staticmethod
    def forward(ctx: Any, rows_NA: Tensor, values: Tensor) -> Tensor:
        return rows_NA.view_as(rows_NA)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NA: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[1]:
            raise ValueError(NO_FP8_GRADIENT)
        return grad_NA, None


def _grid(values: Any, scale: Any, block: Any, gated: bool) -> Tensor | str:
    """Scales `[E, X, Y]` of equal blocks; what is not known here, in words."""
    if not isinstance(values, Tensor) or values.dim() != 3 or values.dtype != torch.float8_e4m3fn:
        return f"{_words(values)} with scales"
    if not isinstance(scale, Tensor) or scale.dtype not in SCALE_DTYPES or scale.dim() != 3:
        return f"fp8 with scales {_words(scale)}"
    (E, B, A), (num_experts, X, Y) = values.shape, scale.shape
    scale = scale.detach().view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale.detach()
    if block is None:
        return scale if num_experts == E and B % X == A % Y == 0 else f"fp8 {_words(values)} with {_words(scale)}"
    # checkpoints store gate and up apart, so that a block does not reach from one into the other
    halves = 2 if gated and 2 * ceil(B // 2 / block[0]) == X else 1
    if (num_experts, X, Y) != (E, halves * ceil(B // halves / block[0]), ceil(A / block[1])):
        return f"fp8 {_words(values)} in blocks of {tuple(block)} with {_words(scale)}"
    scale = _equal_blocks(scale.unflatten(1, (halves, -1)), 2, B // halves, block[0]).flatten(1, 2)
    return _equal_blocks(scale, 2, A, block[1])


def _equal_blocks(scale: Tensor, dim: int, width: int, block: int) -> Tensor:
    """Scales of blocks of which the last is cut off, repeated for smaller ones that are all equal."""
    if scale.shape[dim] == 1 or width % block == 0:
        return scale
    size = gcd(width, block)
    return scale.repeat_interleave(block // size, dim).narrow(dim, 0, width // size)


def _words(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
