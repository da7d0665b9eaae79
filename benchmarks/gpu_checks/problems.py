"""Random layers, and output and gradients of what computes them: an operator, or plain torch in any dtype.

Shape suffixes: T tokens, E experts, P pre-activation width, H hidden, I expert width, R rank.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hf_moe.kernels.layer_call import ExpertForm, LayerCall
from kernel_cases import Layer, low_rank_of, plain_layer

from .setting import Sizes

SWIGLU = ExpertForm("silu")
GPT_OSS = ExpertForm("silu", 1.702, 7.0, 1.0, transposed=True, interleaved=True)
SCALE = 2.0
Compute = Callable[[Mapping[str, Tensor]], Tensor]


def random_layer(
    sizes: Sizes, tokens: int, dtype: torch.dtype, device: str, *, form: ExpertForm = SWIGLU, bias: bool = False,
    skew: float = 0.0, sentinels: bool = False, seed: int = 0,
) -> Layer:  # fmt: skip
    """A layer and its input. `skew` gives late experts more rows; with `sentinels` a fifth of the slots is skipped."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden, width, experts, slots = sizes

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype) * std

    up_shape, down_shape = (experts, 2 * width, hidden), (experts, hidden, width)
    if form.transposed:
        up_shape, down_shape = (experts, hidden, 2 * width), (experts, width, hidden)
    scores = torch.rand(tokens, experts, generator=generator, device=device)
    scores += skew * torch.linspace(0, 3, experts, device=device)
    weights, index = scores.topk(slots, dim=-1)
    weights = weights.softmax(-1).to(dtype)
    if sentinels:
        skipped = torch.rand(index.shape, generator=generator, device=device) < 0.2
        index, weights = index.masked_fill(skipped, experts), weights.masked_fill(skipped, 0.0)
    up_bias, down_bias = (normal(experts, 2 * width), normal(experts, hidden)) if bias else (None, None)
    up, down = normal(*up_shape, std=hidden**-0.5), normal(*down_shape, std=width**-0.5)
    return Layer(normal(tokens, hidden), index, weights, up, up_bias, down, down_bias, form)


def random_factors(layer: Layer, rank: int) -> dict[str, Tensor]:
    """Adapters of both projections of concatenated SwiGLU experts, B as PEFT holds it: the expert is the fastest."""
    generator = torch.Generator(layer.hidden.device).manual_seed(3)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=layer.hidden.device) / math.sqrt(shape[-1])
        return values.to(layer.hidden.dtype)

    (experts, pre_width, hidden), width = layer.up_weight.shape, layer.down_weight.shape[2]
    return {
        "up_a": normal(experts, rank, hidden),
        "up_b": normal(pre_width, rank, experts).permute(2, 0, 1),
        "down_a": normal(experts, rank, width),
        "down_b": normal(hidden, rank, experts).permute(2, 0, 1),
    }


def by_operator(layer: Layer, op: Callable[[LayerCall], Tensor]) -> Compute:
    """`op` on the layer with other tensors, factors among them or not."""

    def compute(tensors: Mapping[str, Tensor]) -> Tensor:
        own, factors = _apart(tensors)
        low_rank = low_rank_of(factors, (SCALE, SCALE)) if factors else None
        return op(replace(layer, **own).call(low_rank))

    return compute


def by_plain_torch(layer: Layer) -> Compute:
    """The same in plain torch: `W + scale * b @ a` where there are factors."""

    def compute(tensors: Mapping[str, Tensor]) -> Tensor:
        own, factors = _apart(tensors)
        changed = replace(layer, **own)
        for name in ("up", "down") if factors else ():
            weight = getattr(layer, f"{name}_weight") + SCALE * factors[f"{name}_b"] @ factors[f"{name}_a"]
            changed = replace(changed, **{f"{name}_weight": weight})
        return plain_layer(changed)

    return compute


def _apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    factors = {name: tensor for name, tensor in tensors.items() if name.endswith(("_a", "_b"))}
    return {name: tensor for name, tensor in tensors.items() if name not in factors}, factors


def with_gradients(compute: Compute, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`out`, and the gradient of every tensor for one random gradient of it."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    out = compute(leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(7), device=out.device)
    # exact in every dtype, so that all compute the same problem
    gradients = torch.autograd.grad(out, list(leaves.values()), cotangent.bfloat16().to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, gradients, strict=True))}
