"""The benchmark's own comparison (`benchmarks/experts.py`), a process for each layer, without what is wrong."""

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..expert_layers.command import run_plan
from ..expert_layers.contestants import HF_MOE, PEERS
from .setting import Setting

# by operator of the checks; every case is compared with float64 once more before it is timed
RUN_BY = {"triton": (HF_MOE, "hf_moe_triton"), "hybrid": ("hf_moe_grouped",)}


def contestants(wrong: set[str]) -> list[str]:
    left_out = {name for operator in wrong for name in RUN_BY.get(operator, ())}
    return [name for name in (HF_MOE, "hf_moe_triton", "hf_moe_grouped", *PEERS) if name not in left_out]


def time_layer(setting: Setting, name: str, wrong: set[str], output: Path, until: float) -> int:
    """Every case of one layer, into `experts_cuda.json`; without adapters and decoding where these are wrong."""
    plan = setting.plan()
    cases = [case for case in plan.cases if case.layer.name == name and case.mode not in wrong]
    plan = replace(plan, cases=tuple(cases), case_seconds=setting.case_seconds)
    deadline = time.monotonic() + until - time.time()
    return run_plan(plan, contestants(wrong), output, 1, deadline, Console(width=200))
