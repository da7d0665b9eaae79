"""Weights in fp8: loaded as they are stored, multiplied by the scale of their block, and rounded to the rows' dtype.

So a product has the bits that it has with dense weights `(values.float() * scale).to(dtype)`. It needs SM89 or newer,
where float8_e4m3fn is converted in hardware.

Shape suffixes: E experts; N and K the widths of a product that its weight's outputs and inputs run over.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = torch.float8_e4m3fn
# scales: floating, or the bytes of float8_e8m0fnu, which Triton has no type for
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


def scale_arguments(scale: Tensor | None, weight: Tensor, swapped: bool = False) -> dict[str, Any]:
    """Arguments of kernels that call `load_weight`; of dense weights, without a scale, they are never read.

    Args:
        scale: [E, blocks of B, blocks of A] of a weight [E, B, A].
        swapped: Whether N, which the product's columns run over, is A and not B.
    """
    n, k = (2, 1) if swapped else (1, 2)
    if scale is None:
        strides, blocks = [0, 0, 0], [0, 0]
    else:
        strides = [scale.stride(dim) for dim in (0, n, k)]
        blocks = [weight.shape[dim] // scale.shape[dim] for dim in (n, k)]
    return {
        "weight_scale": weight if scale is None else scale,
        "stride_scale_e": strides[0],
        "stride_scale_n": strides[1],
        "stride_scale_k": strides[2],
        "SCALE_N": blocks[0],
        "SCALE_K": blocks[1],
    }


@triton.jit
def scaled(values, scale, DTYPE: tl.constexpr):
    """Weights of fp8 values, rounded to DTYPE."""
    if scale.dtype == tl.uint8:  # the exponent of a power of two; 0 is 2^-127 and 255 is NaN
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent == 0, 0x400000, tl.where(exponent == 255, 0x7FC00000, exponent << 23))
        factor = bits.to(tl.float32, bitcast=True)
    else:
        factor = scale.to(tl.float32)
    return (values.to(tl.float32) * factor).to(DTYPE)


@triton.jit
def load_scale(scale_at, k, ks, stride, ok, all_ok, SCALE_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales of the steps k + ks of K: one for all of them where a block holds whole steps.

    scale_at: Those of the first block of K. ok: Without the dimension of ks. all_ok: With it.
    """
    if SCALE_K % BLOCK_K == 0:
        return tl.load(scale_at + (k // SCALE_K) * stride, mask=ok, other=0)
    else:
        return tl.load(scale_at + ((k + ks) // SCALE_K) * stride, mask=all_ok, other=0)


@triton.jit
def scale_places(scale_of_expert, cols, stride_n, SCALE_N: tl.constexpr):
    """Where the scales [1, N] of an expert's columns begin; for dense weights nothing that is read."""
    if SCALE_N > 0:
        return scale_of_expert + (cols // SCALE_N)[None, :] * stride_n
    else:
        return scale_of_expert


@triton.jit
def load_weight(weight_at, ok, scales, k, DTYPE: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A block [BLOCK_K, N] of weights from step k of K on, in DTYPE; dense ones as they are.

    ok: [1, N], or [BLOCK_K, N] where K is no multiple of BLOCK_K. scales: `scale_places`, and the stride over the
    blocks of K, which have SCALE_K steps, 0 for dense weights.
    """
    weight = tl.load(weight_at, mask=ok, other=0.0)
    if SCALE_K > 0:
        ks = tl.arange(0, BLOCK_K)[:, None]
        # a block of scales that holds whole steps is cut off nowhere, so that `ok` is [1, N]
        factor = load_scale(scales[0], k, ks, scales[1], ok, ok, SCALE_K, BLOCK_K)
        weight = scaled(weight, factor, DTYPE)
    return weight
