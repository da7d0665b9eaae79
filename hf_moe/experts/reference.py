"""The experts layer as a loop to read, for every variant of the host's contract, every dtype and every device."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe.experts.contract import has_post_expert_norm, num_expert_ids, read_weights
from hf_moe.experts.dispatch import check_ids
from hf_moe.kernels.layer_call import ExpertWeights


def reference_forward(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every token through its experts, slot by slot, in the dtype of the weights; sums over slots in float32.

    Arguments, result and errors as `run_experts`. Slow: for judging the others.
    """
    weights = read_weights(experts)
    check_ids(top_k_index, num_expert_ids(experts, len(weights.down)))
    rows = hidden_states.to(weights.down.dtype)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out_TH = torch.zeros_like(rows, dtype=wide)
    with torch.autocast(rows.device.type, enabled=False):
        for slot in range(top_k_index.shape[1]):
            slot_TH = torch.zeros_like(out_TH)
            for expert in range(len(weights.down)):
                tokens = torch.where(top_k_index[:, slot] == expert)[0]
                if len(tokens):
                    out = _run_expert(experts, weights, expert, rows[tokens])
                    slot_TH = slot_TH.index_copy(0, tokens, out.to(wide) * top_k_weights[tokens, slot, None].to(wide))
            out_TH = out_TH + slot_TH
    return out_TH.to(hidden_states.dtype)


def _run_expert(experts: Any, weights: ExpertWeights, expert: int, rows: Tensor) -> Tensor:
    pre = _linear(rows, weights.up, weights.up_bias, expert, experts.is_transposed)
    act = experts._apply_gate(pre) if experts.has_gate else experts.act_fn(pre)
    out = _linear(act.to(pre.dtype), weights.down, weights.down_bias, expert, experts.is_transposed)
    return experts.post_expert_norm(out) if has_post_expert_norm(experts) else out


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, expert: int, transposed: bool) -> Tensor:
    matrix = weight[expert].T if transposed else weight[expert]
    return F.linear(rows, matrix, None if bias is None else bias[expert])
