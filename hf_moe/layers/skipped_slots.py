"""Slots without an expert: the id `num_experts`, and the two flags on a module of experts that say it may come.

`may_skip_slots` is ours: a router's null experts, capacity, experts of which a part is trained. `_is_expert_parallel`
is transformers' and means that another process computes the slot. Transformers' own implementations read no other word
than theirs: where slots may be empty it is set too (without it `batched_mm` fails on such an id, and `grouped_mm`
returns rows that nobody wrote), so it takes the number of experts to know whether they are distributed.

Checkpoints that carry older code of hf_moe, without `may_skip_slots`, set `_is_expert_parallel` alone.

Source: transformers 5.23, `integrations/moe.py`, `distributed/expert_parallel.py`.
"""

from typing import Any

from torch import nn


def may_skip_slots(experts: nn.Module) -> bool | None:
    """Whether the id `num_experts` may come; None if nothing says so (transformers 5.17 has no flag)."""
    if vars(experts).get("may_skip_slots"):
        return True
    return getattr(experts, "_is_expert_parallel", None)


def is_expert_parallel(experts: nn.Module, router: nn.Module | None) -> bool:
    """Whether this process holds a part of the experts that the router chooses among."""
    flags = vars(experts)
    return bool(flags.get("_is_expert_parallel")) and flags.get("num_experts") != getattr(router, "num_experts", None)


def let_skip_slots(experts: Any) -> dict[str, bool]:
    """Allow the id `num_experts`, also to transformers' implementations; returns the flags that were set before."""
    before = {name: vars(experts)[name] for name in ("may_skip_slots", "_is_expert_parallel") if name in vars(experts)}
    experts.may_skip_slots = True
    if "_is_expert_parallel" in before:
        experts._is_expert_parallel = True
    return before


def restore_skip_flags(experts: Any, before: dict[str, bool]) -> None:
    """Undo `let_skip_slots`."""
    if "may_skip_slots" not in before:
        del experts.may_skip_slots
    for name, value in before.items():
        setattr(experts, name, value)
