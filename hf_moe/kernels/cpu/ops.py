"""The CPU engine's operators: experts of one layer, and a grouped linear.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), A and B the inner and outer width of a grouped linear.
"""

import torch
from torch import Tensor

from ..layer_call import LayerCall
from .build import load_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def cpu_experts(call: LayerCall) -> Tensor:
    """The weighted sum of every token's experts [T, H], differentiable in all floating arguments.

    Args:
        hidden_TH: float32, bfloat16, float16 or float64; weights and biases have the same dtype.
        index_TK: Expert ids, integers in [0, num_ids). Id E computes nothing.
        weights_TK: Routing weights, of any floating dtype.
        up_weight: [E, P, H], transposed [E, H, P].
        up_bias: [E, P].
        down_weight: [E, H, I], transposed [E, I, H].
        down_bias: [E, H].
        num_ids: E, or E + 1 where slots without an expert are allowed.
        activation: silu, gelu (erf), gelu_tanh, relu or relu2. Gated: (clamp(up, -limit, limit) + offset) times
            f(min(gate, limit)), with alpha the slope of silu's sigmoid. Ungated: f(pre).
        gated: Whether the pre-activations are gate and up, first and second half or, interleaved, even and odd.

    Raises:
        IndexError: An id is not in [0, num_ids).
        ValueError: Shapes, dtypes or the activation do not fit.
        RuntimeError: The kernels cannot be built; see `why_not`.
    """
    hidden_TH, index_TK, weights_TK, (up_weight, up_bias, down_weight, down_bias), num_ids, form, _ = call
    activation, alpha, limit, offset, gated, transposed, interleaved = form
    tensors = (hidden_TH, weights_TK, up_weight, up_bias, down_weight, down_bias)
    keep_pre = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return _experts(
        hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids, activation,
        alpha, limit, offset, gated, transposed, interleaved, keep_pre,
    )[0]  # fmt: skip


@torch.library.custom_op("hf_moe::cpu_experts", mutates_args=(), device_types="cpu")
def _experts(
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
    keep_pre: bool,
) -> tuple[Tensor, Tensor]:
    """Returns out_TH and, for backward, the pre-activations [N, P] of the rows sorted by expert."""
    load_kernels()
    _check_experts(
        hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids, activation,
        gated, transposed,
    )  # fmt: skip
    return torch.ops.hf_moe_cpu.experts_forward(
        hidden_TH.contiguous(), _ids(index_TK), weights_TK, up_weight, _dense(up_bias), down_weight,
        _dense(down_bias), num_ids, activation, alpha, limit, offset, gated, transposed, interleaved, keep_pre,
    )  # fmt: skip


@_experts.register_fake
def _(hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids, activation, alpha, limit,
      offset, gated, transposed, interleaved, keep_pre):  # fmt: skip
    pre_width = up_weight.shape[2 if transposed else 1]
    pre_shape = (index_TK.shape[0] * index_TK.shape[1], pre_width) if keep_pre else (0,)
    return hidden_TH.new_empty(hidden_TH.shape), hidden_TH.new_empty(pre_shape)


@torch.library.custom_op("hf_moe::cpu_experts_backward", mutates_args=(), device_types="cpu")
def _experts_backward(
    grad_TH: Tensor,
    pre_NP: Tensor,
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
    need: list[bool],
) -> list[Tensor]:
    """Gradients of hidden, weights, up weight, up bias, down weight and down bias; empty where `need` is false."""
    return torch.ops.hf_moe_cpu.experts_backward(
        grad_TH.contiguous(), pre_NP.contiguous(), hidden_TH.contiguous(), _ids(index_TK), weights_TK, up_weight,
        _dense(up_bias), down_weight, _dense(down_bias), num_ids, activation, alpha, limit, offset, gated, transposed,
        interleaved, need,
    )  # fmt: skip


@_experts_backward.register_fake
def _(grad_TH, pre_NP, hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids,
      activation, alpha, limit, offset, gated, transposed, interleaved, need):  # fmt: skip
    given = (hidden_TH, weights_TK, up_weight, up_bias, down_weight, down_bias)
    return [
        tensor.new_empty(tensor.shape) if needed else hidden_TH.new_empty((0,))
        for tensor, needed in zip(given, need, strict=True)
    ]


def _save_for_backward(ctx, inputs, output):
    tensors, ctx.settings = inputs[:7], inputs[7:15]
    ctx.save_for_backward(output[1], *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_TH, _):
    pre_NP, *tensors = ctx.saved_tensors
    if grad_TH is None:
        return (None,) * 16
    differentiable = [0, 2, 3, 4, 5, 6]
    need = [ctx.needs_input_grad[i] for i in differentiable]
    grads = _experts_backward(grad_TH, pre_NP, *tensors, *ctx.settings, need)
    out = [None] * 16
    for i, needed, grad in zip(differentiable, need, grads, strict=True):
        out[i] = grad if needed else None
    return tuple(out)


_experts.register_autograd(_differentiate, setup_context=_save_for_backward)


@torch.library.custom_op("hf_moe::cpu_grouped_linear", mutates_args=(), device_types="cpu")
def cpu_grouped_linear(
    rows_NA: Tensor, weight: Tensor, bias: Tensor | None, expert_end_E: Tensor, transposed: bool
) -> Tensor:
    """One linear map per expert, [N, B], over rows that are sorted by expert; differentiable in rows, weight and bias.

    Args:
        rows_NA: float32, bfloat16, float16 or float64; weight and bias have the same dtype.
        weight: [E, B, A], transposed [E, A, B].
        bias: [E, B].
        expert_end_E: int32 or int64, where each expert's rows end; the rows past the last end give zeros.

    Raises:
        IndexError: The ends fall, or there are more than N.
        ValueError: Shapes or dtypes do not fit.
        RuntimeError: The kernels cannot be built; see `why_not`.
    """
    load_kernels()
    inner, outer = weight.shape[1:] if transposed else (weight.shape[2], weight.shape[1])
    _check_dtype(rows_NA.dtype)
    _check_shape("rows", rows_NA, (rows_NA.shape[0], inner), rows_NA.dtype)
    _check_shape("weight", weight, tuple(weight.shape), rows_NA.dtype)
    _check_shape("bias", bias, (weight.shape[0], outer), rows_NA.dtype)
    _check_shape("expert_end", expert_end_E, (weight.shape[0],), expert_end_E.dtype)
    return torch.ops.hf_moe_cpu.grouped_linear(
        rows_NA.contiguous(), weight, _dense(bias), _ids(expert_end_E), transposed
    )


@cpu_grouped_linear.register_fake
def _(rows_NA, weight, bias, expert_end_E, transposed):
    return rows_NA.new_empty((rows_NA.shape[0], weight.shape[2 if transposed else 1]))


@torch.library.custom_op("hf_moe::cpu_grouped_linear_backward", mutates_args=(), device_types="cpu")
def _grouped_linear_backward(
    grad_NB: Tensor, rows_NA: Tensor, weight: Tensor, expert_end_E: Tensor, transposed: bool, need: list[bool]
) -> list[Tensor]:
    """Gradients of rows, weight and bias; empty where `need` is false."""
    return torch.ops.hf_moe_cpu.grouped_linear_backward(
        grad_NB.contiguous(), rows_NA.contiguous(), weight, _ids(expert_end_E), transposed, need
    )


@_grouped_linear_backward.register_fake
def _(grad_NB, rows_NA, weight, expert_end_E, transposed, need):
    shapes = (rows_NA.shape, weight.shape, (weight.shape[0], grad_NB.shape[1]))
    return [rows_NA.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, need, strict=True)]


def _save_for_grouped_backward(ctx, inputs, output):
    rows_NA, weight, _, expert_end_E, ctx.transposed = inputs
    ctx.save_for_backward(rows_NA, weight, expert_end_E)


def _differentiate_grouped(ctx, grad_NB):
    rows_NA, weight, expert_end_E = ctx.saved_tensors
    need = [ctx.needs_input_grad[i] for i in range(3)]
    grads = _grouped_linear_backward(grad_NB, rows_NA, weight, expert_end_E, ctx.transposed, need)
    return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None


cpu_grouped_linear.register_autograd(_differentiate_grouped, setup_context=_save_for_grouped_backward)


def _ids(index: Tensor) -> Tensor:
    return index.to(torch.int64).contiguous()


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _check_experts(
    hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids, activation, gated, transposed
) -> None:
    dtype = hidden_TH.dtype
    _check_dtype(dtype)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}.")
    (tokens, hidden), experts = hidden_TH.shape, up_weight.shape[0]
    width = down_weight.shape[1 if transposed else 2]
    pre = 2 * width if gated else width
    _check_shape("up_weight", up_weight, (experts, hidden, pre) if transposed else (experts, pre, hidden), dtype)
    down_shape = (experts, width, hidden) if transposed else (experts, hidden, width)
    _check_shape("down_weight", down_weight, down_shape, dtype)
    _check_shape("up_bias", up_bias, (experts, pre), dtype)
    _check_shape("down_bias", down_bias, (experts, hidden), dtype)
    _check_shape("index", index_TK, (tokens, weights_TK.shape[1]), index_TK.dtype)
    _check_shape("weights", weights_TK, tuple(index_TK.shape), weights_TK.dtype)
    if num_ids not in (experts, experts + 1):
        raise ValueError(f"num_ids must be {experts} (the experts) or one more, got {num_ids}.")


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"hidden states must be float32, bfloat16, float16 or float64, got {dtype}: cast them.")


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}.")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} like the hidden states, got {tensor.dtype}: cast one of them.")
