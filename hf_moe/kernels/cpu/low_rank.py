"""Experts under low-rank adapters on the CPU: rows go through the factors, `W + BA` and its gradient never exist.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), R rank.
"""

import torch
from torch import Tensor

from ..layer_call import LayerCall, flatten
from .build import load_kernels
from .ops import _check_experts, _check_shape, _dense, _ids


def cpu_experts_lora(call: LayerCall) -> Tensor:
    """`cpu_experts` with weights `up + up_scale * up_b @ up_a` and `down + down_scale * down_b @ down_a`.

    Neither the sums nor their gradients ever exist: rows go through the factors. The base is frozen.

    A pair that is None adds nothing; each has a rank of its own.

    Args:
        up_a: [E, R, H], any strides, as the other factors.
        up_b: [E, P, R].
        down_a: [E, R, I].
        down_b: [E, H, R].

    Raises:
        ValueError: If shapes or dtypes do not fit, or the gradient of a base weight or bias would be needed.
        IndexError, RuntimeError: As `cpu_experts`.
    """
    hidden_TH, index_TK, weights_TK, (up_weight, up_bias, down_weight, down_bias), num_ids, form, _ = call
    activation, alpha, limit, offset, gated, transposed, interleaved = form
    up_a, up_b, up_scale, down_a, down_b, down_scale = flatten(call)[15:]
    base = {"up_weight": up_weight, "up_bias": up_bias, "down_weight": down_weight, "down_bias": down_bias}
    given = (hidden_TH, weights_TK, up_a, up_b, down_a, down_b)
    keep = False
    if torch.is_grad_enabled():
        _require_frozen(base)
        keep = any(tensor is not None and tensor.requires_grad for tensor in given)
    return _experts_lora(
        hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids, activation, alpha, limit,
        offset, gated, transposed, interleaved, up_a, up_b, down_a, down_b, up_scale, down_scale, keep,
    )[0]  # fmt: skip


def _require_frozen(base: dict[str, Tensor | None]) -> None:
    trained = ", ".join(name for name, tensor in base.items() if tensor is not None and tensor.requires_grad)
    if trained:
        raise ValueError(
            f"The base under an adapter is frozen, but {trained} requires grad: call requires_grad_(False)."
        )


@torch.library.custom_op("hf_moe::cpu_experts_lora", mutates_args=(), device_types="cpu")
def _experts_lora(
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    num_ids: int,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    up_scale: float,
    down_scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out_TH and, for backward, pre_NP, up_low_NR and down_low_NR of the rows sorted by expert; empty unless kept."""
    load_kernels()
    _check_experts(
        hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids, activation,
        gated, transposed,
    )  # fmt: skip
    _check_factors("up", up_weight, up_a, up_b, transposed)
    _check_factors("down", down_weight, down_a, down_b, transposed)
    return torch.ops.hf_moe_cpu.experts_lora_forward(
        hidden_TH.contiguous(), _ids(index_TK), weights_TK, up_weight, _dense(up_bias), down_weight, _dense(down_bias),
        num_ids, activation, alpha, limit, offset, gated, transposed, interleaved, up_a, up_b, down_a, down_b,
        up_scale, down_scale, keep,
    )  # fmt: skip


@_experts_lora.register_fake
def _(hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids, activation, alpha, limit,
      offset, gated, transposed, interleaved, up_a, up_b, down_a, down_b, up_scale, down_scale, keep):  # fmt: skip
    rows = index_TK.shape[0] * index_TK.shape[1]

    def kept(width: int | None) -> Tensor:
        return hidden_TH.new_empty((rows, width) if keep and width is not None else (0,))

    ranks = (None if factor is None else factor.shape[1] for factor in (up_a, down_a))
    pre_width = up_weight.shape[2 if transposed else 1]
    return hidden_TH.new_empty(hidden_TH.shape), kept(pre_width), *(kept(rank) for rank in ranks)


@torch.library.custom_op("hf_moe::cpu_experts_lora_backward", mutates_args=(), device_types="cpu")
def _experts_lora_backward(
    grad_TH: Tensor,
    pre_NP: Tensor,
    up_low_NR: Tensor,
    down_low_NR: Tensor,
    hidden_TH: Tensor,
    index_TK: Tensor,
    weights_TK: Tensor,
    up_weight: Tensor,
    up_bias: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    num_ids: int,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    up_scale: float,
    down_scale: float,
    need: list[bool],
) -> list[Tensor]:
    """Gradients of hidden, weights, up_a, up_b, down_a and down_b, contiguous; empty where `need` is false."""
    return torch.ops.hf_moe_cpu.experts_lora_backward(
        grad_TH.contiguous(), pre_NP.contiguous(), up_low_NR.contiguous(), down_low_NR.contiguous(),
        hidden_TH.contiguous(), _ids(index_TK), weights_TK, up_weight, _dense(up_bias), down_weight, _dense(down_bias),
        num_ids, activation, alpha, limit, offset, gated, transposed, interleaved, up_a, up_b, down_a, down_b,
        up_scale, down_scale, need,
    )  # fmt: skip


@_experts_lora_backward.register_fake
def _(grad_TH, pre_NP, up_low_NR, down_low_NR, hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight,
      down_bias, up_a, up_b, down_a, down_b, num_ids, activation, alpha, limit, offset, gated, transposed, interleaved,
      up_scale, down_scale, need):  # fmt: skip
    given = (hidden_TH, weights_TK, up_a, up_b, down_a, down_b)
    return [
        tensor.new_empty(tensor.shape) if needed else hidden_TH.new_empty((0,))
        for tensor, needed in zip(given, need, strict=True)
    ]


def _save_for_backward(ctx, inputs, output):
    ctx.settings = (*inputs[7:15], *inputs[19:21])
    ctx.save_for_backward(*output[1:], *inputs[:7], *inputs[15:19])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_TH, *_):
    out = [None] * 22
    if grad_TH is None:
        return tuple(out)
    differentiable = [0, 2, 15, 16, 17, 18]
    need = [ctx.needs_input_grad[i] for i in differentiable]
    grads = _experts_lora_backward(grad_TH, *ctx.saved_tensors, *ctx.settings, need)
    for i, needed, grad in zip(differentiable, need, grads, strict=True):
        out[i] = grad if needed else None
    return tuple(out)


_experts_lora.register_autograd(_differentiate, setup_context=_save_for_backward)


def _check_factors(name: str, weight: Tensor, a: Tensor | None, b: Tensor | None, transposed: bool) -> None:
    if a is None and b is None:
        return
    experts, out, inner = weight.permute((0, 2, 1) if transposed else (0, 1, 2)).shape
    got = [None if factor is None else tuple(factor.shape) for factor in (a, b)]
    rank = a.shape[1] if a is not None and a.dim() == 3 else 0
    if rank < 1 or got != [(experts, rank, inner), (experts, out, rank)]:
        raise ValueError(
            f"{name}_a must be [{experts}, R, {inner}] and {name}_b [{experts}, {out}, R] with R >= 1, or both None, "
            f"got {got[0]} and {got[1]}."
        )
    _check_shape(f"{name}_a", a, (experts, rank, inner), weight.dtype)
    _check_shape(f"{name}_b", b, (experts, out, rank), weight.dtype)
