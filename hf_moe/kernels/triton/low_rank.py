"""Experts under low-rank adapters: rows go through the factors, `W + BA` and its gradient never exist.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated), R rank.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..layer_call import LayerCall, flatten
from .backward_activation import launch_backward_activation
from .grouped_linear import launch_grouped_linear
from .layer import (
    GATE,
    LAYER,
    ORDER,
    SAVED,
    Gate,
    differentiates,
    gpu_op,
    hidden_gradient,
    kept_shapes,
    like_wanted,
    nothing_kept,
    placed,
    project_down,
    require_kept,
    require_one_dtype,
    require_shapes,
    weight_gradient,
)
from .routing import RowOrder, sort_rows
from .up import launch_up

_FACTORS = "Tensor? up_a, Tensor? up_b, Tensor? down_a, Tensor? down_b, float up_scale, float down_scale"


class LoraWants(NamedTuple):
    """Which gradients of a layer with adapters are wanted, in the order they are returned."""

    hidden: bool
    weights: bool
    up_a: bool
    up_b: bool
    down_a: bool
    down_b: bool


def triton_experts_lora(call: LayerCall) -> Tensor:
    """`triton_experts` with weights `up + up_scale * up_b @ up_a` and `down + down_scale * down_b @ down_a`.

    Neither the sums nor their gradients ever exist: rows go through the factors. The base is frozen.

    A pair that is None adds nothing; each has a rank of its own.

    Args:
        up_a: [E, R, H], any strides, as the other factors.
        up_b: [E, P, R].
        down_a: [E, R, I].
        down_b: [E, H, R].

    Raises:
        ValueError: If shapes or dtypes do not fit, or the gradient of a base weight or bias would be needed.
        IndexError, RuntimeError: As `triton_experts`.
    """
    hidden_TH, index_TK, weights_TK, (up_weight, up_bias, down_weight, down_bias), num_ids, form, _ = call
    activation, alpha, limit, offset, gated, transposed, interleaved = form
    up_a, up_b, up_scale, down_a, down_b, down_scale = flatten(call)[15:]
    gate = Gate(activation, alpha, limit, offset, gated, transposed, interleaved)
    factors = {"up_a": up_a, "up_b": up_b, "down_a": down_a, "down_b": down_b}
    base = {"up_weight": up_weight, "up_bias": up_bias, "down_weight": down_weight, "down_bias": down_bias}
    require_shapes(hidden_TH, index_TK, weights_TK, up_weight, down_weight, gate)
    require_one_dtype(hidden=hidden_TH, **base, **factors)
    _require_factors(up_weight, up_a, up_b, down_weight, down_a, down_b, transposed)
    if differentiates(*base.values()):
        trained = ", ".join(name for name, tensor in base.items() if tensor is not None and tensor.requires_grad)
        raise ValueError(
            f"The base under an adapter is frozen, but {trained} requires grad: call requires_grad_(False)."
        )
    layer = (hidden_TH, index_TK, weights_TK, *base.values())
    keep = differentiates(*layer, *factors.values())
    scales = (up_scale, down_scale)
    return torch.ops.hf_moe.triton_experts_lora(*layer, *factors.values(), *scales, num_ids, keep, *gate)[0]


def _require_factors(up, up_a, up_b, down, down_a, down_b, transposed: bool) -> None:
    for name, weight, pair in (("up", up, (up_a, up_b)), ("down", down, (down_a, down_b))):
        if pair == (None, None):
            continue
        E, out, width = weight.permute((0, 2, 1) if transposed else (0, 1, 2)).shape
        got = [None if factor is None else tuple(factor.shape) for factor in pair]
        rank = pair[0].shape[1] if got[0] is not None and len(got[0]) == 3 else 0
        if rank < 1 or got != [(E, rank, width), (E, out, rank)]:
            raise ValueError(
                f"{name}_a must be [{E}, R, {width}] and {name}_b [{E}, {out}, R] with R >= 1, or both None, got "
                f"{got[0]} and {got[1]}."
            )


def _times(
    rows: Tensor, factor: Tensor | None, scale: float, order: RowOrder, top_k: int, *, transposed: bool = False,
    gather: bool = False,
) -> Tensor | None:  # fmt: skip
    """scale * rows @ factor[e]^T [N, R] (without the transpose if transposed); None if there is no adapter."""
    if factor is None:
        return None
    return launch_grouped_linear(rows, factor, order, top_k=top_k, transposed=transposed, gather=gather, scale=scale)


@gpu_op(
    "hf_moe::triton_experts_lora",
    f"({LAYER}, {_FACTORS}, int num_ids, bool keep, {GATE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _experts_lora(
    hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias,
    up_a, up_b, down_a, down_b, up_scale, down_scale, num_ids, keep, *gate,
):  # fmt: skip
    """(out_TH, pre_NP, up_low_NR, order_N, expert_end_E); all but the output are empty unless kept for backward."""
    gate, top_k = Gate(*gate), index_TK.shape[1]
    order = sort_rows(index_TK, up_weight.shape[0], num_ids)
    up_low_NR = _times(hidden_TH, up_a, up_scale, order, top_k, gather=True)
    act_NI, pre_NP = launch_up(
        hidden_TH,
        up_weight,
        order,
        top_k=top_k,
        bias=up_bias,
        store_pre=keep,
        low=up_low_NR,
        low_weight=up_b,
        **gate._asdict(),
    )
    down_low_NR = _times(act_NI, down_a, down_scale, order, top_k)
    out_TH = project_down(act_NI, weights_TK, down_weight, down_bias, order, gate.transposed, down_low_NR, down_b)
    if not keep:
        pre_NP, order = nothing_kept(hidden_TH)
    if not keep or up_low_NR is None:
        up_low_NR = hidden_TH.new_empty(0)
    return out_TH, pre_NP, up_low_NR, *order


@_experts_lora.register_fake
def _(
    hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias,
    up_a, up_b, down_a, down_b, up_scale, down_scale, num_ids, keep, *gate,
):  # fmt: skip
    pre_NP, *order = kept_shapes(hidden_TH, index_TK, up_weight, keep, Gate(*gate).transposed)
    up_low_NR = hidden_TH.new_empty((index_TK.numel(), up_a.shape[1]) if keep and up_a is not None else 0)
    return hidden_TH.new_empty(hidden_TH.shape), pre_NP, up_low_NR, *order


@gpu_op(
    "hf_moe::triton_experts_lora_backward",
    f"(Tensor grad_out, {SAVED}, Tensor up_low, {_FACTORS}, {ORDER}, bool[] wants, {GATE}) -> Tensor[]",
)
def _experts_lora_backward(
    grad_out_TH, hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, up_low_NR,
    up_a, up_b, down_a, down_b, up_scale, down_scale, order_N, expert_end_E, wants, *gate,
):  # fmt: skip
    """The wanted gradients, in the order of `LoraWants`."""
    gate, wants, order = Gate(*gate), LoraWants(*wants), RowOrder(order_N, expert_end_E)
    top_k = weights_TK.shape[1]
    if not pre_NP.shape[0]:
        empty = like_wanted((hidden_TH, weights_TK, up_a, up_b, down_a, down_b), wants)
        return [gradient.zero_() for gradient in empty]

    grad_low_NR = _times(grad_out_TH, down_b, down_scale, order, top_k, transposed=True, gather=True)
    grad_pre_NP, weighted_act_NI, grad_weights_TK = launch_backward_activation(
        grad_out_TH,
        down_weight,
        pre_NP,
        order,
        weights_TK,
        top_k=top_k,
        down_bias=down_bias,
        low=grad_low_NR,
        low_weight=down_a,
        need_act=wants.down_a or wants.down_b,
        need_grad_weights=wants.weights,
        **gate._asdict(),
    )
    grad_up_low_NR = None
    if wants.hidden or wants.up_a:
        grad_up_low_NR = _times(grad_pre_NP, up_b, up_scale, order, top_k, transposed=True)
    gradients = []
    if wants.hidden:
        gradients.append(hidden_gradient(grad_pre_NP, up_weight, order, top_k, gate.transposed, grad_up_low_NR, up_a))
    if grad_weights_TK is not None:
        gradients.append(grad_weights_TK.to(weights_TK.dtype))
    if wants.up_a and grad_up_low_NR is not None:
        gradients.append(weight_gradient(grad_up_low_NR, hidden_TH, order, top_k, "in"))
    if wants.up_b:
        gradients.append(weight_gradient(grad_pre_NP, up_low_NR, order, top_k))
    if weighted_act_NI is not None and wants.down_a and grad_low_NR is not None:
        gradients.append(weight_gradient(grad_low_NR, weighted_act_NI, order, top_k))
    if weighted_act_NI is not None and wants.down_b:
        weighted_low_NR = launch_grouped_linear(
            weighted_act_NI, down_a, order, top_k=top_k, transposed=False, scale=down_scale
        )
        gradients.append(weight_gradient(grad_out_TH, weighted_low_NR, order, top_k, "out"))
    return gradients


@_experts_lora_backward.register_fake
def _(
    grad_out_TH, hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, up_low_NR,
    up_a, up_b, down_a, down_b, up_scale, down_scale, order_N, expert_end_E, wants, *gate,
):  # fmt: skip
    return like_wanted((hidden_TH, weights_TK, up_a, up_b, down_a, down_b), wants)


def _keep_adapted_layer(ctx, inputs, output) -> None:
    hidden_TH, _, weights_TK, up_weight, _, down_weight, down_bias, *inputs = inputs
    *factors, up_scale, down_scale, _, keep = inputs[:8]
    require_kept(keep)
    _, pre_NP, up_low_NR, *order = output
    ctx.scales, ctx.gate = (up_scale, down_scale), inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, up_low_NR, *factors, *order
    )


def _differentiate_adapted_layer(ctx, grad_out_TH, *_):
    needs = ctx.needs_input_grad
    wants = LoraWants(needs[0], needs[2], *needs[7:11])
    if grad_out_TH is None:
        return (None,) * len(needs)
    *saved, order_N, expert_end_E = ctx.saved_tensors
    gradients = torch.ops.hf_moe.triton_experts_lora_backward(
        grad_out_TH, *saved, *ctx.scales, order_N, expert_end_E, list(wants), *ctx.gate
    )
    hidden, weights, *factors = placed(gradients, wants)
    return (hidden, None, weights, None, None, None, None, *factors, *(None for _ in needs[11:]))


_experts_lora.register_autograd(_differentiate_adapted_layer, setup_context=_keep_adapted_layer)
