"""Refusals of the operators: arguments whose shapes, dtypes or activation the compiled kernels do not take.

Shape suffixes: T tokens, K slots per token, E experts, H hidden, I expert width, P pre-activation width, R rank, A and
B the inner and outer width of a grouped linear.
"""

import torch
from torch import Tensor

from ..layer_call import LayerCall
from ..layer_op import require_factors

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def require_layer(call: LayerCall) -> None:
    """Raise ValueError for a call that the kernels do not take."""
    hidden_TH, index_TK, weights_TK, (up, up_bias, down, down_bias, *scales), num_ids, form, _ = call
    dtype, (tokens, H), E = hidden_TH.dtype, hidden_TH.shape, up.shape[0]
    _require_dtype(dtype)
    if scales != [None, None]:
        raise ValueError("the CPU's kernels take no scales: use weights that are dense.")
    if form.activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {form.activation!r}.")
    width = down.shape[1 if form.transposed else 2]
    P = 2 * width if form.gated else width
    _require("up_weight", up, (E, H, P) if form.transposed else (E, P, H), dtype)
    _require("down_weight", down, (E, width, H) if form.transposed else (E, H, width), dtype)
    if up_bias is not None:
        _require("up_bias", up_bias, (E, P), dtype)
    if down_bias is not None:
        _require("down_bias", down_bias, (E, H), dtype)
    if index_TK.shape != weights_TK.shape or index_TK.shape[0] != tokens:
        _require("index", index_TK, (tokens, weights_TK.shape[1]), index_TK.dtype)
        _require("weights", weights_TK, index_TK.shape, weights_TK.dtype)
    if num_ids != E and num_ids != E + 1:
        raise ValueError(f"num_ids must be {E} (the experts) or one more, got {num_ids}.")


def require_adapters(call: LayerCall) -> None:
    """Raise ValueError for factors that do not fit the experts."""
    require_factors(call)
    for name, factors in zip(("up", "down"), call.low_rank or (), strict=False):
        if factors is not None:
            _require(f"{name}_a", factors.a, factors.a.shape, call.hidden_TH.dtype)
            _require(f"{name}_b", factors.b, factors.b.shape, call.hidden_TH.dtype)


def require_linear(
    rows_NA: Tensor, weight: Tensor, bias: Tensor | None, expert_end_E: Tensor, transposed: bool
) -> None:
    """Raise ValueError for a grouped linear that the kernels do not take."""
    inner, outer = weight.shape[1:] if transposed else (weight.shape[2], weight.shape[1])
    _require_dtype(rows_NA.dtype)
    _require("rows", rows_NA, (rows_NA.shape[0], inner), rows_NA.dtype)
    _require("weight", weight, weight.shape, rows_NA.dtype)
    if bias is not None:
        _require("bias", bias, (weight.shape[0], outer), rows_NA.dtype)
    _require("expert_end", expert_end_E, (weight.shape[0],), expert_end_E.dtype)


def _require_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"hidden states must be float32, bfloat16, float16 or float64, got {dtype}: cast them.")


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}.")
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} like the hidden states, got {tensor.dtype}: cast one of them.")
