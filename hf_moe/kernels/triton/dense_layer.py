"""What the ops of a layer with dense weights share, whoever multiplies: schemas, fakes, what is saved, autograd.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, P pre-activation width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .layer import GATE, LAYER, ORDER, SAVED, Gate, kept_shapes, like_wanted, placed, require_kept

FORWARD = f"({LAYER}, int num_ids, bool keep, {GATE}) -> (Tensor, Tensor, Tensor, Tensor)"
BACKWARD = f"(Tensor grad_out, {SAVED}, {ORDER}, bool[] wants, {GATE}) -> Tensor[]"


class LayerWants(NamedTuple):
    """Which gradients of a layer with dense weights are wanted, in the order they are returned."""

    hidden: bool
    weights: bool
    up_weight: bool
    up_bias: bool
    down_weight: bool
    down_bias: bool


def gradients_like(hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, wants) -> list[Tensor]:
    """Memory for the wanted gradients."""
    up_bias = up_weight.new_empty(up_weight.shape[0], pre_NP.shape[1])
    return like_wanted((hidden_TH, weights_TK, up_weight, up_bias, down_weight, down_bias), wants)


def make_differentiable(forward: torch.library.CustomOpDef, backward: torch.library.CustomOpDef) -> None:
    """Give ops of the schemas FORWARD and BACKWARD their fakes, and the first the second as its gradient."""

    def differentiate(ctx, grad_out_TH, *_):
        needs = ctx.needs_input_grad
        wants = LayerWants(needs[0], *needs[2:7])
        if grad_out_TH is None:
            return (None,) * len(needs)
        hidden, *rest = placed(backward(grad_out_TH, *ctx.saved_tensors, list(wants), *ctx.gate), wants)
        return (hidden, None, *rest, *(None for _ in needs[7:]))

    forward.register_fake(_fake_forward)
    backward.register_fake(_fake_backward)
    forward.register_autograd(differentiate, setup_context=_keep)


def _fake_forward(hidden_TH, index_TK, weights_TK, up_weight, up_bias, down_weight, down_bias, num_ids, keep, *gate):
    kept = kept_shapes(hidden_TH, index_TK, up_weight, keep, Gate(*gate).transposed)
    return hidden_TH.new_empty(hidden_TH.shape), *kept


def _fake_backward(
    grad_out_TH, hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, order, ends, wants, *gate
):
    return gradients_like(hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, wants)


def _keep(ctx, inputs, output) -> None:
    hidden_TH, _, weights_TK, up_weight, _, down_weight, down_bias, _, keep, *ctx.gate = inputs
    require_kept(keep)
    _, pre_NP, order_N, expert_end_E = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_TH, weights_TK, up_weight, down_weight, down_bias, pre_NP, order_N, expert_end_E)
