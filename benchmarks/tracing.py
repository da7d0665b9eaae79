"""Measure the cost of recording the routing.

    python benchmarks/tracing.py                    the CPU plan, under 3 minutes on 2 cores
    python benchmarks/tracing.py --device cuda
    python benchmarks/tracing.py --quick            tiny sizes: does it work?

A Qwen3-MoE of 105 M parameters in float32 (4 layers, 64 experts of width 256, top 8), its experts on transformers'
grouped_mm: the same forward, and forward with backward, without recording, with `record_routing(model)` and with
`record_routing(model, "tokens")`. The forward of one token shows the cost that no token shares: it has no target.
Each contestant has a copy of the model; "plain again" is a second copy without recording: how far it is from 1 is what
the measurement cannot tell. Recording that changes a logit or miscounts is not timed, and the command fails.
"""

import copy
import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import date
from pathlib import Path
from typing import Any

import torch
from expert_layers.clocks import Contestant, CpuClock, CudaClock
from expert_layers.results import ROOT, environment
from expert_layers.timing import METHOD, median_ratio, time_undisturbed
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_moe.observability.recording import record_routing
from hf_moe.observability.routing_trace import RoutingTrace

PLAIN, AGAIN, COUNTS, TOKENS = "plain", "plain again", "counts", "tokens"
SIZES = {"hidden_size": 512, "num_experts": 64, "moe_intermediate_size": 256, "num_hidden_layers": 4}
QUICK = {"hidden_size": 32, "num_experts": 8, "moe_intermediate_size": 16, "num_hidden_layers": 2}
TOP_K, VOCAB, LENGTH, QUICK_LENGTH = 8, 1024, 1024, 64
LIMIT = 1.03


class WrongResultError(RuntimeError):
    """Recording changes the model or miscounts."""


def build(sizes: dict[str, int], device: str) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **sizes,
        vocab_size=VOCAB,
        intermediate_size=2 * sizes["hidden_size"],
        num_experts_per_tok=min(TOP_K, sizes["num_experts"]),
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=sizes["hidden_size"] // 8,
        use_cache=False,
    )
    config._experts_implementation = "grouped_mm"
    return Qwen3MoeForCausalLM(config).to(device)


def tokens(count: int, device: str) -> Tensor:
    return torch.randint(0, VOCAB, (1, count), generator=torch.Generator().manual_seed(1)).to(device)


def check(models: dict[str, Any], traces: dict[str, RoutingTrace], ids: Tensor) -> None:
    """The logits of all models are the same, and every slot is counted.

    Raises:
        WrongResultError: If not.
    """
    with torch.no_grad():
        logits = {name: model(input_ids=ids).logits for name, model in models.items()}
    for name, trace in traces.items():
        if not torch.equal(logits[name], logits[PLAIN]):
            raise WrongResultError(f"the model computes other logits while {name} are recorded.")
        for layer in map(trace.statistics, trace.layers):
            counted = (layer.tokens, int(layer.counts.sum()), layer.scored_tokens)
            if counted != (ids.numel(), ids.numel() * layer.top_k, ids.numel()):
                raise WrongResultError(f"{name}: {layer.name} counts {counted} for {ids.numel()} tokens.")


def step_of(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss

    return step


def forward_of(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def forward() -> Tensor:
        return model(input_ids=ids).logits

    return forward


def measure(runs: dict[str, Callable[[], Tensor]], device: str, budget: float) -> dict[str, Any]:
    clock = CudaClock() if device == "cuda" else CpuClock()
    contestants = {name: Contestant(run) for name, run in runs.items()}
    times, late, others_share = time_undisturbed(contestants, clock, budget, [PLAIN])
    results: dict[str, Any] = {}
    for name, seconds in times.items():
        median = sorted(seconds)[len(seconds) // 2]
        ratio = median_ratio(seconds, times[PLAIN])
        results[name] = {"ms": _short(1e3 * median), "rounds": len(seconds), "to_plain": _short(ratio)}
        if name in late:
            results[name]["late"] = True
    return results | {"used_by_others": _short(others_share)}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def run(options: Namespace) -> int:
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    sizes, length = (QUICK, QUICK_LENGTH) if options.quick else (SIZES, LENGTH)
    model = build(sizes, options.device)
    models = {name: copy.deepcopy(model) for name in (PLAIN, AGAIN, COUNTS, TOKENS)}
    data: dict[str, Any] = {
        "date": date.today().isoformat(),
        **environment(options.device, torch.get_num_threads()),
        "model": sizes | {"top_k": min(TOP_K, sizes["num_experts"]), "vocab": VOCAB, "dtype": "float32"},
        "rules": {"timing": METHOD},
        "cases": {},
    }
    with ExitStack() as stack:
        traces = {name: stack.enter_context(record_routing(models[name], name)) for name in (COUNTS, TOKENS)}
        check(models, traces, tokens(length, options.device))
        for kind, count in (("step", length), ("forward", length), ("forward", 1)):
            case, of = f"{kind} of {count} token" + "s" * (count > 1), step_of if kind == "step" else forward_of
            runs = {name: of(each, tokens(count, options.device)) for name, each in models.items()}
            data["cases"][case] = measure(runs, options.device, options.case_seconds)
            print(case, data["cases"][case], flush=True)
    judged = list(data["cases"])[:2]
    data["targets"] = [_verdict(case, data["cases"][case][COUNTS]["to_plain"]) for case in judged]
    for verdict in data["targets"]:
        print(f"{'met ' if verdict['met'] else 'MISSED'} {verdict['target']}: {verdict['value']}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(data, indent=1) + "\n")
    return 0


def _verdict(case: str, value: float) -> dict[str, Any]:
    return {"target": f"{case}: counts over plain at most {LIMIT}", "value": value, "met": value <= LIMIT}


def parser() -> ArgumentParser:
    found = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--case-seconds", type=float, default=50.0, help="budget of a case's rounds")
    found.add_argument("--threads", type=int, help="default: every core that the process may use")
    found.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    found.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "tracing.json")
    return found


if __name__ == "__main__":
    sys.exit(run(parser().parse_args()))
