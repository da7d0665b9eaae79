"""A forward on the meta device, where tensors have shapes and no values: what it keeps for backward, for any family.

Three things cannot run there, and get a stand-in that keeps what the real one keeps:

- the attention of `scaled_dot_product_attention`: queries, keys, values, mask, output and a float32 for each head and
  token, as the flash and memory-efficient kernels of GPUs do. (Without these kernels a layer keeps scores of
  `[heads, tokens, tokens]`, as families do whose attention is written out, gpt-oss among them.)
- the experts: as the fused operators of `hf_moe` do (`kernels/triton/layer.py`), the rows' pre-activations; step by
  step, as `experts/pipeline.py`, where these do not know the activation.
- a question to a value, such as whether a row holds several examples: the answer is yes or 1, one example a row.

Shape suffixes: T tokens, K slots per token, N = T * K routed rows, H hidden size, P pre-activation width, R rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_moe.experts.contract import activation_of, has_post_expert_norm
from hf_moe.kernels.layer_call import LowRankPair
from hf_moe.layers.moe_layers import is_experts
from hf_moe.layers.storage import storage_of
from hf_moe.planner.saved_bytes import saved_bytes


class ShapesError(ValueError):
    """The forward of a model cannot run on shapes alone."""


def computed_saved_bytes(model: nn.Module, tokens: int, rows: int = 1) -> int:
    """Bytes that the forward and the loss of `rows` rows of `tokens` tokens would keep for backward.

    Args:
        model: On the meta device, with adapters if it has some; what requires a gradient is trained.

    Raises:
        ShapesError: If an operation of the model needs values.
    """
    ids = torch.ones(rows, tokens, dtype=torch.int64, device="meta")
    try:
        with _stand_ins(model):
            return saved_bytes(model, {"input_ids": ids, "labels": ids})
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ShapesError(f"{type(error).__name__}: {str(error).splitlines()[0]:.120}") from error


@contextmanager
def _stand_ins(model: nn.Module) -> Iterator[None]:
    experts = [module for module in model.modules() if is_experts(module)]
    for module in experts:
        module.forward = partial(_experts, module)
    try:
        with _Attention(), _Answers():
            yield
    finally:
        for module in experts:
            del module.forward


class _Answers(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


class _Attention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _attend(*args, **(kwargs or {}))


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    return _KeepAttention.apply(query, key, value, attn_mask)


class _Keep(torch.autograd.Function):
    """Memory like `out`; all other arguments are kept for backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *kept: Tensor | None) -> Tensor:
        ctx.save_for_backward(*kept)
        return torch.empty_like(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("shapes have no gradient")


class _KeepAttention(_Keep):
    """The output, kept with the arguments; in memory it is `[..., tokens, heads, width]`, as from the kernels."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, *others: Tensor | None) -> Tensor:
        *batch, heads, tokens, _ = query.shape
        width = others[1].shape[-1]  # type: ignore[union-attr]
        out = query.new_empty(*batch, tokens, heads, width).transpose(-3, -2)
        ctx.save_for_backward(query, *others, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out


def _experts(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    low_rank: LowRankPair | None = None,
) -> Tensor:
    """The experts' forward, `[T, H]`."""
    storage = storage_of(experts)
    hidden_TH, num_rows = hidden_states.to(storage.dtype), top_k_index.numel()
    pre_NP = hidden_TH.new_empty(num_rows, storage.shape("up")[0])
    adapters = [] if low_rank is None else [each for each in low_rank.to(storage.dtype) if each is not None]
    factors = [tensor for each in adapters for tensor in (each.a, each.b)]
    low_NR = [hidden_TH.new_empty(num_rows, each.a.shape[1]) for each in adapters]
    order = hidden_TH.new_empty(num_rows, dtype=torch.int32)
    # of the model itself, and so not counted: but where they are trained the output requires a gradient
    trained = [p for p in experts.parameters() if p.requires_grad]
    kept: list[Any] = [hidden_TH, top_k_weights, order, pre_NP, *factors, *low_NR, *trained]
    if activation_of(experts) is None or has_post_expert_norm(experts):
        kept += _steps(experts, pre_NP, hidden_TH)
    return _Keep.apply(hidden_TH, *kept).to(hidden_states.dtype)


def _steps(experts: Any, pre_NP: Tensor, hidden_TH: Tensor) -> list[Tensor]:
    """What the steps of the pipeline keep beside the pre-activations: what the gate computes, rows and outputs."""
    inner: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        inner.append(tensor)
        return tensor

    pre_NP.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        act_NI = experts._apply_gate(pre_NP) if experts.has_gate else experts.act_fn(pre_NP)
    rows = [hidden_TH.new_empty(len(pre_NP), hidden_TH.shape[1]) for _ in range(2)]
    return [*inner, act_NI.detach(), *rows]
