"""Gated experts that are plain tensors, not a module of transformers, through the backend of the model's experts."""

import torch.nn.functional as F
from torch import Tensor

from hf_moe.experts import backends
from hf_moe.experts.request import request_for
from hf_moe.kernels.layer_call import ExpertWeights
from hf_moe.layers.storage import DenseStorage

# torch alone: what runs beside a backend of transformers neither compiles nor needs anything
PORTABLE = "hf_moe_grouped"


class GatedExperts:
    """Stand-in for an experts module, for `silu(gate) * up` experts whose tensors the caller holds.

    It is no module: nothing that walks over a model takes it for a layer of experts.
    """

    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(self) -> None:
        self.act_fn = F.silu

    def _apply_gate(self, pre: Tensor) -> Tensor:
        gate, up = pre.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def run_gated_experts(
    implementation: str | None,
    experts: GatedExperts,
    gate_up: Tensor,
    down: Tensor,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """`sum_k weight_k * expert_k(hidden)` for each token.

    Args:
        implementation: The model's `experts_implementation`. One of ours runs these experts too; beside those of
            transformers (eager, grouped_mm, ...) and the reference `hf_moe_grouped` runs them.
        gate_up: `[E, 2I, H]`, the gate's rows first, in the dtype to compute in.
        down: `[E, H, I]`, the same dtype.
        hidden_states: `[T, H]`.
        top_k_index: `[T, K]`, integer.
        top_k_weights: `[T, K]`.

    Returns:
        `[T, H]` in the dtype of `hidden_states`.

    Raises:
        ValueError: If `implementation` is ours and cannot run on this device or in this dtype.
        IndexError: On the CPU, for an expert id out of range.
    """
    storage = DenseStorage(ExpertWeights(gate_up, None, down, None), transposed=False)
    # like factors of adapters, these tensors go to operators of ours, not to modules' kernels (HF_MOE_DELEGATE)
    known = backends.BACKENDS.get(implementation or "eager")
    name = known.name if known is not None and known.takes_low_rank else PORTABLE
    row = backends.resolve(name, *request_for(experts, storage, adapted=True))
    return backends.run_row(row, experts, storage, hidden_states, top_k_index, top_k_weights)
