"""Gated experts that are plain tensors, not a module of the host, through the engine that runs the model's experts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe.experts import engines
from hf_moe.experts.pipeline import Engine, run_experts
from hf_moe.kernels.layer_call import ExpertWeights

# torch alone: what runs beside an implementation of the host neither compiles nor needs anything
PORTABLE = "hf_moe_grouped"


class GatedExperts:
    """What engines ask of an experts module, for `silu(gate) * up` experts whose tensors the caller holds.

    It is no module: nothing that walks over a model takes it for a layer of experts.

    Args:
        hidden_size: Width of the rows that the experts read and write.
        width: Inner width of one expert.
    """

    has_gate = True
    has_bias = False
    is_transposed = False
    is_concatenated = True
    has_post_expert_norm = False
    _is_expert_parallel = False

    def __init__(self, hidden_size: int, width: int):
        self.act_fn = F.silu
        # the shape alone: engines choose by it
        self._parameters = {"down_proj": torch.empty(1, hidden_size, width, device="meta")}
        self._buffers: dict[str, Tensor] = {}

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
        implementation: The model's `experts_implementation`. One of ours runs these experts too; beside the host's
            own (eager, grouped_mm, ...) `hf_moe_grouped` runs them.
        experts: Of the sizes of the tensors.
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
    engine = _engine(implementation, experts, down, engines.has_many_rows(top_k_index, down))
    weights = ExpertWeights(gate_up, None, down, None)
    return run_experts(engine, experts, weights, hidden_states, top_k_index, top_k_weights)


def _engine(implementation: str | None, experts: GatedExperts, down: Tensor, many_rows: bool) -> Engine:
    name = implementation if implementation in engines.REFUSALS else PORTABLE
    # like factors of adapters, these tensors cannot go to the host's kernels (HF_MOE_DELEGATE)
    only_ours = True
    resolved = engines.resolve(name, experts, down.dtype, down.device, many_rows, only_ours)
    return engines.ENGINES[resolved]
