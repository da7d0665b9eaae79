"""The experts layer as a loop to read, for every variant of transformers' contract, storage, dtype and device."""

from typing import Any

import torch
from torch import Tensor

from hf_moe.experts.contract import has_post_expert_norm, num_expert_ids
from hf_moe.experts.dispatch import check_ids
from hf_moe.layers.storage import ExpertStorage, Plan


def run_reference(
    experts: Any, storage: ExpertStorage, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Every token through its experts, slot by slot, in the dtype of the weights; sums over slots in float32.

    Arguments, result and errors as `run_experts`. Slow: for judging the others.
    """
    check_ids(top_k_index, num_expert_ids(experts, storage.num_experts))
    rows = hidden_states.to(storage.dtype)
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out_TH = torch.zeros_like(rows, dtype=wide)
    with torch.autocast(rows.device.type, enabled=False):
        for slot in range(top_k_index.shape[1]):
            slot_TH = torch.zeros_like(out_TH)
            for expert in range(storage.num_experts):
                tokens = torch.where(top_k_index[:, slot] == expert)[0]
                if len(tokens):
                    out = _run_expert(experts, storage, expert, rows[tokens])
                    slot_TH = slot_TH.index_copy(0, tokens, out.to(wide) * top_k_weights[tokens, slot, None].to(wide))
            out_TH = out_TH + slot_TH
    return out_TH.to(hidden_states.dtype)


def _run_expert(experts: Any, storage: ExpertStorage, expert: int, rows: Tensor) -> Tensor:
    plan = _plan(expert, storage.num_experts, rows)
    pre = storage.linear(rows, "up", plan)
    act = experts._apply_gate(pre) if experts.has_gate else experts.act_fn(pre)
    out = storage.linear(act.to(pre.dtype), "down", plan)
    return experts.post_expert_norm(out) if has_post_expert_norm(experts) else out


def _plan(expert: int, num_experts: int, rows: Tensor) -> Plan:
    """All rows for one expert."""
    end_E = torch.zeros(num_experts, dtype=torch.int32, device=rows.device)
    end_E[expert:] = len(rows)
    return Plan(torch.arange(len(rows), device=rows.device), end_E)
