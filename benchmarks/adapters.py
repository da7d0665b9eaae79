"""What does expert LoRA cost beyond the frozen model under it, through PEFT's own path and accelerated?

    python benchmarks/adapters.py                    the CPU plan, under 4 minutes on 2 cores
    python benchmarks/adapters.py --device cuda
    python benchmarks/adapters.py --quick            tiny sizes: does it work?

A Qwen3-MoE of 105 M parameters, one optimizer step or the forward of one token, four contestants in one run:

- frozen (grouped_mm), frozen (hf_moe): no adapter; the first layer's input norm is trained, 512 values, so that the
  gradient crosses every layer. The floor.
  A little more than adapters need: their gradient ends at the first layer's experts.
- stock PEFT: factors on both projections of every expert, experts on transformers' grouped_mm.
- accelerated: the same after accelerate_adapters.

A contestant whose outputs or gradients are wrong is not timed, and the command fails.
"""

import copy
import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from expert_layers.clocks import Contestant, CpuClock, CudaClock
from expert_layers.results import ROOT, environment
from expert_layers.timing import METHOD, median_ratio, peak_bytes, time_undisturbed
from peft import get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import hf_moe
from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config

FROZEN_STOCK, FROZEN, STOCK, OURS = "frozen (grouped_mm)", "frozen (hf_moe)", "stock PEFT", "accelerated"
SIZES = {"hidden_size": 512, "num_experts": 64, "moe_intermediate_size": 256, "num_hidden_layers": 4}
QUICK = {"hidden_size": 32, "num_experts": 8, "moe_intermediate_size": 16, "num_hidden_layers": 2}
TOP_K, RANK, VOCAB = 8, 16, 1024
TOKENS = (1024, 256)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RULE = (
    "outputs and gradients of accelerated against stock, and of frozen (hf_moe) against frozen (grouped_mm), as "
    "|a - b| / |b| over each tensor: float32 at most 1e-4; bfloat16 with b in float32 from the same values, and at "
    "most twice what transformers' path has"
)
PEAK = "largest sum of tensor bytes allocated during one step above those at its start (torch profiler on the CPU)"


@dataclass(frozen=True)
class Target:
    """`case`: value of `who` over value of `other` is at most `limit`, or at least where `at_least`."""

    case: str
    who: str
    other: str
    limit: float
    field: str = "ms"
    at_least: bool = False

    def verdict(self, cases: dict[str, Any]) -> dict[str, Any]:
        results = cases[self.case]
        value = results[self.who][f"{self.field}_to"][self.other]
        met = value >= self.limit if self.at_least else value <= self.limit
        bound = "at least" if self.at_least else "at most"
        text = f"{self.case}: {self.who} over {self.other} ({self.field}) {bound} {self.limit}"
        return {"target": text, "value": value, "met": met}


TARGETS = (
    Target("float32, step of 1024 tokens", OURS, FROZEN, 1.15),
    Target("float32, step of 256 tokens", OURS, FROZEN, 1.3),
    Target("float32, forward of one token", OURS, FROZEN, 1.6),
    Target("bfloat16, step of 1024 tokens", STOCK, OURS, 1.3, at_least=True),
    Target("float32, step of 1024 tokens", OURS, FROZEN, 1.25, field="peak_mb"),
    Target("bfloat16, step of 1024 tokens", OURS, FROZEN, 1.25, field="peak_mb"),
)


class WrongResultError(RuntimeError):
    """A contestant computes something else."""


def build(sizes: dict[str, int], dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The contestants' models, with the same weights and factors."""
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
    base = Qwen3MoeForCausalLM(config).to(device, dtype)
    models = {FROZEN_STOCK: copy.deepcopy(base), FROZEN: copy.deepcopy(base)}
    models[FROZEN].set_experts_implementation("hf_moe")
    for frozen in models.values():
        frozen.requires_grad_(False)
        frozen.model.layers[0].input_layernorm.requires_grad_(True)
    models[STOCK] = get_peft_model(base, expert_lora_config(base, r=RANK))
    with torch.no_grad():
        for name, parameter in models[STOCK].named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02)
    models[OURS] = copy.deepcopy(models[STOCK])
    accelerate_adapters(models[OURS])
    return {name: model.train() for name, model in models.items()}


def tokens(count: int, device: str) -> Tensor:
    rows = 2 if count > 1 else 1
    return torch.randint(0, VOCAB, (rows, count // rows), generator=torch.Generator().manual_seed(1)).to(device)


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The logits and every gradient of one loss, float32."""
    model.zero_grad()
    outputs: Any = model(input_ids=ids, labels=ids)
    outputs.loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": outputs.logits.detach().float(), **found}


def distance(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    if actual.keys() != expected.keys():
        raise WrongResultError(f"gradients of {sorted(actual.keys() ^ expected.keys())} are missing on one side.")
    return max(((actual[name] - value).norm() / value.norm()).item() for name, value in expected.items())


def check(models: dict[str, Any], ids: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """The distances of `RULE`.

    Raises:
        WrongResultError: If one is too large.
    """
    found = {}
    for name, stock in ((OURS, STOCK), (FROZEN, FROZEN_STOCK)):
        theirs = gradients(models[stock], ids)
        if dtype == torch.float32:
            found[name], allowed = distance(gradients(models[name], ids), theirs), 1e-4
        else:
            exact = gradients(copy.deepcopy(models[stock]).float(), ids)
            found[name], allowed = distance(gradients(models[name], ids), exact), 2 * distance(theirs, exact)
        if not found[name] <= allowed:
            raise WrongResultError(f"{name} in {dtype} is off by {found[name]:.3g}, allowed is {allowed:.3g}.")
    return found


def step_of(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> Tensor:
        optimizer.zero_grad()
        outputs: Any = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        return outputs.loss

    return step


def forward_of(model: nn.Module, ids: Tensor) -> Callable[[], Tensor]:
    @torch.no_grad()
    def forward() -> Tensor:
        outputs: Any = model(input_ids=ids)
        return outputs.logits

    return forward


def peak_of(run: Callable[[], Tensor], device: str) -> int:
    """Bytes of `PEAK`; on a GPU as the allocator counts them."""
    run()  # what stays: the optimizer's state
    if device == "cuda":
        return peak_bytes(run, device)[1] or 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        largest = max(largest, total)
    return largest


def measure(runs: dict[str, Callable[[], Tensor]], device: str, budget: float, peaks: bool) -> dict[str, Any]:
    clock = CudaClock() if device == "cuda" else CpuClock()
    contestants = {name: Contestant(run) for name, run in runs.items()}
    times, late, others_share = time_undisturbed(contestants, clock, budget, [FROZEN_STOCK, FROZEN])
    bytes_of = {name: peak_of(run, device) for name, run in runs.items()} if peaks else {}
    results: dict[str, Any] = {}
    for name in runs:
        values = sorted(times[name])
        results[name] = {
            "ms": _short(1e3 * values[len(values) // 2]),
            "rounds": len(values),
            "ms_to": {other: _short(median_ratio(times[name], times[other])) for other in runs if other != name},
        }
        if name in late:
            results[name]["late"] = True
        if peaks:
            results[name]["peak_mb"] = _short(bytes_of[name] / 2**20)
            ratios = {other: _short(bytes_of[name] / bytes_of[other]) for other in runs if other != name}
            results[name]["peak_mb_to"] = ratios
    return results | {"used_by_others": _short(others_share)}


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def run(options: Namespace) -> int:
    torch.set_num_threads(options.threads or len(os.sched_getaffinity(0)))
    sizes = QUICK if options.quick else SIZES
    shape = sizes | {"top_k": min(TOP_K, sizes["num_experts"]), "vocab": VOCAB, "rank": RANK}
    data: dict[str, Any] = {
        "date": date.today().isoformat(),
        **environment(options.device, torch.get_num_threads()),
        "model": shape,
        "rules": {"timing": METHOD, "correctness": RULE, "peak": PEAK},
        "cases": {},
    }
    for dtype_name, dtype in DTYPES.items():
        models = build(sizes, dtype, options.device)
        data["backend"] = list(hf_moe.explain(models[OURS]).choices)
        distances = check(models, tokens(TOKENS[1], options.device), dtype)
        data.setdefault("distances", {})[dtype_name] = {name: _short(value) for name, value in distances.items()}
        for count in (*TOKENS, 1):
            case = f"{dtype_name}, " + (f"step of {count} tokens" if count > 1 else "forward of one token")
            of, ids = (step_of if count > 1 else forward_of), tokens(count, options.device)
            runs = {name: of(model, ids) for name, model in models.items()}
            data["cases"][case] = measure(runs, options.device, options.case_seconds, peaks=count > 1)
            print(_line(case, data["cases"][case]), flush=True)
    data["targets"] = [target.verdict(data["cases"]) for target in TARGETS]
    for verdict in data["targets"]:
        print(f"{'met ' if verdict['met'] else 'MISSED'} {verdict['target']}: {verdict['value']}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(data, indent=1) + "\n")
    return 0


def _line(case: str, results: dict[str, Any]) -> str:
    parts = []
    for name in (FROZEN_STOCK, FROZEN, STOCK, OURS):
        peak = f", {results[name]['peak_mb']} MB" if "peak_mb" in results[name] else ""
        ratio = "" if name == FROZEN else f" = {results[name]['ms_to'][FROZEN]}x"
        parts.append(f"{name} {results[name]['ms']} ms{ratio}{peak}")
    return f"{case}: " + "; ".join(parts)


def parser() -> ArgumentParser:
    found = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--case-seconds", type=float, default=12.0, help="budget of a case's rounds")
    found.add_argument("--threads", type=int, help="default: every core that the process may use")
    found.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    found.add_argument("--output", type=Path, help="default: benchmarks/results/adapters_DEVICE.json")
    return found


if __name__ == "__main__":
    chosen = parser().parse_args()
    chosen.output = chosen.output or ROOT / "benchmarks" / "results" / f"adapters_{chosen.device}.json"
    sys.exit(run(chosen))
