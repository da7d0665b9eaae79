"""One case after the other: build, compare with float64, time, record.

Shape suffixes: T tokens, K slots per token, E experts, H hidden.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from . import contestants as who
from .cases import DECODE, LORA, TRAIN, Case, Layer, build_experts, build_inputs
from .clocks import Clock, Contestant
from .contestants import DENSE, HF_MOE, NATIVES, STREAM, Forward
from .correctness import Judge, Outcome, Stacks, compared_experts, judge, plain_torch
from .lora import SCALE, LoraLayer, takes_factors
from .timing import Timing, captured, median_ratio, peak_bytes, saved_bytes, time_undisturbed

STREAM_UP_TO_TOKENS = 64


@dataclass(frozen=True)
class Subject:
    """One implementation on one case's tensors: how to run it, what it trains, and its stacks' gradients [E, ...]."""

    forward: Forward
    module: nn.Module
    gradients: Callable[[], dict[str, Tensor | None]] = dict


class Bench:
    """The shared parts of one layer's cases: weights by dtype, and inputs and exact result of the last size."""

    def __init__(self, layer: Layer, device: str, clock: Clock):
        self.layer, self.device, self.clock = layer, device, clock
        self.experts = lru_cache(2)(lambda dtype: build_experts(layer, dtype, device))
        self.inputs = lru_cache(1)(lambda tokens, routing: build_inputs(layer, tokens, routing, device))
        self.lora = lru_cache(2)(lambda dtype, accelerated: LoraLayer(self.experts(dtype), accelerated=accelerated))
        # one for all dtypes, because all values are exact in bfloat16
        self.exact = lru_cache(1)(self._exact)
        self.judge = lru_cache(2)(self._judge)

    def _stacks(self, dtype: torch.dtype, with_lora: bool) -> Stacks:
        experts: Any = self.experts(dtype)
        tensors = {"up": experts.gate_up_proj, "down": experts.down_proj}
        if with_lora:
            tensors |= self.lora(dtype, False).factors(lambda parameter: parameter)
        return Stacks(tensors, SCALE)

    def _exact(self, tokens: int, routing: str, with_lora: bool) -> Outcome:
        return plain_torch(self.inputs(tokens, routing), self._stacks(torch.bfloat16, with_lora), torch.float64)

    def _judge(self, tokens: int, routing: str, dtype: torch.dtype, with_lora: bool) -> Judge:
        exact = self.exact(tokens, routing, with_lora)
        return judge(self.inputs(tokens, routing), self._stacks(dtype, with_lora), dtype, exact)

    def measure(self, case: Case, names: list[str], budget: float) -> dict[str, Any]:
        """The record of `case`; its `results` tell of every name a time, or why there is none."""
        return CaseRun(self, case).measure(names, budget)


class CaseRun:
    """All contestants on the tensors of one case."""

    def __init__(self, bench: Bench, case: Case):
        self.bench, self.case = bench, case
        self.inputs = bench.inputs(case.tokens, case.routing).to(case.torch_dtype)
        self.inputs = self.inputs._replace(
            hidden_TH=self.inputs.hidden_TH.clone(), weights_TK=self.inputs.weights_TK.clone()
        )
        self.hit = len(self.inputs.index_TK.unique())
        self.trains = who.wants_gradients(case.mode)
        self.inputs.hidden_TH.requires_grad_(self.trains)
        self.inputs.weights_TK.requires_grad_(self.trains)
        self.experts: Any = bench.experts(case.torch_dtype)
        self.experts.requires_grad_(case.mode == TRAIN)
        self.chosen = who.chosen(self.experts, case)

    def measure(self, names: list[str], budget: float) -> dict[str, Any]:
        case, subjects, results = self.case, dict[str, Subject](), dict[str, dict[str, Any]]()
        for name in names:
            results[name] = self._admit(name, subjects)
        contestants = {name: self._contestant(subject) for name, subject in subjects.items()} | self._floors()
        timing = time_undisturbed(contestants, self.bench.clock, budget, NATIVES)
        for contestant in contestants.values():
            contestant.prepare()  # drops the gradients
        return {
            "layer": vars(case.layer),
            "tokens": case.tokens,
            "dtype": case.dtype,
            "mode": case.mode,
            "routing": case.routing,
            "experts_hit": self.hit,
            "forward_gflop": round(case.layer.flops(case.tokens) / 1e9, 3),
            "used_by_others": round(timing.others, 3),
        } | summary(timing, results)

    def _admit(self, name: str, subjects: dict[str, Subject]) -> dict[str, Any]:
        """Adds `name` to `subjects` if it runs and is right; what was measured on the way, or why it is left out."""
        if (reason := who.skip_reason(name, self.case, self.hit)) is not None:
            return {"skipped": reason}
        if HF_MOE in subjects and name == self.chosen["runs"]:
            return {"skipped": f"what {HF_MOE} runs here"}
        if name == "hf_moe_grouped" and self.case.tokens > who.REFERENCE_LIMIT and self.chosen["runs"] == "hf_moe_cpu":
            return {"skipped": f"second choice, not timed above {who.REFERENCE_LIMIT} tokens"}
        if (reason := who.refusal(name, self.experts, self.case)) is not None:
            return {"refused": reason}
        try:
            subject = self._subject(name)
            facts = self._check(subject)
        except who.ERRORS as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            # what ours cannot run they say before; a graph may fail for a reason that is none in itself
            return {"wrong" if who.is_ours(name) and self.case.mode != DECODE else "refused": reason}
        if "wrong" not in facts:
            subjects[name] = subject
        return facts | (self.chosen if name == HF_MOE else {})

    def _subject(self, name: str) -> Subject:
        if self.case.mode == LORA:
            return Subject(*self.bench.lora(self.case.torch_dtype, takes_factors(name)).run_by(name))
        forward = self._captured(who.forward_by_name(name, self.experts))
        if self.case.mode != TRAIN:
            return Subject(forward, self.experts)
        up, down = self.experts.gate_up_proj, self.experts.down_proj
        return Subject(forward, self.experts, lambda: {"up": up.grad, "down": down.grad})

    def _captured(self, forward: Forward) -> Forward:
        """In the decode mode on a GPU: a replay of the CUDA graph of `forward` on this case's inputs."""
        if self.case.mode != DECODE or self.bench.device != "cuda":
            return forward
        replay = captured(lambda: forward(self.inputs.hidden_TH, self.inputs.index_TK, self.inputs.weights_TK))
        return lambda hidden, index, weights: replay()

    def _forward(self, subject: Subject) -> Tensor:
        return subject.forward(self.inputs.hidden_TH, self.inputs.index_TK, self.inputs.weights_TK)

    def _step(self, subject: Subject) -> Tensor:
        """The step that is timed."""
        if not self.trains:
            with torch.no_grad():
                return self._forward(subject)
        out = self._forward(subject)
        out.backward(self.inputs.grad_TH)
        return out

    def _clear(self, subject: Subject) -> None:
        self.inputs.hidden_TH.grad = self.inputs.weights_TK.grad = None
        subject.module.zero_grad(set_to_none=True)

    def _contestant(self, subject: Subject) -> Contestant:
        return Contestant(lambda: self._step(subject), lambda: self._clear(subject))

    def _floors(self) -> dict[str, Contestant]:
        dense = who.DenseMlp(self.case.layer, self.case.torch_dtype, self.bench.device)
        dense.requires_grad_(self.case.mode == TRAIN)
        floors = {DENSE: self._contestant(Subject(self._captured(dense), dense))}
        if not self.trains and self.case.tokens <= STREAM_UP_TO_TOKENS:
            nbytes = self.hit * self.case.layer.expert_values * self.case.torch_dtype.itemsize
            floors[STREAM] = Contestant(who.streaming(nbytes, self.bench.device))
        return floors

    def _check(self, subject: Subject) -> dict[str, Any]:
        """Compares with float64; gives `wrong`, or the bytes saved for backward and the peak of a step."""
        case, facts = self.case, dict[str, Any]()
        self._clear(subject)
        out, peak = peak_bytes(lambda: self._step(subject), self.bench.device)
        found: dict[str, Tensor | None] = {"out": out.detach()}
        if self.trains:
            found |= {"hidden": self.inputs.hidden_TH.grad, "weights": self.inputs.weights_TK.grad}
            compared = compared_experts(self.inputs.index_TK, case.layer.num_experts)
            for stack, gradient_E in subject.gradients().items():
                found |= {f"{stack}[{e}]": gradient_E if gradient_E is None else gradient_E[e] for e in compared}
        judge = self.bench.judge(case.tokens, case.routing, case.torch_dtype, case.mode == LORA)
        objection = judge.objection(found)
        self._clear(subject)
        if objection is not None:
            return {"wrong": objection}
        if self.trains:
            facts["saved_bytes"] = saved_bytes(lambda: self._forward(subject), subject.module)
        if peak is not None:
            facts["peak_bytes"] = peak
        return facts


def summary(timing: Timing, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The floors' times, the best native, and `results` with times and ratios added."""
    times = timing.seconds
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    floors = [name for name in (DENSE, STREAM) if name in medians]
    most = max(map(len, times.values()))
    natives = [name for name in NATIVES if len(times.get(name, ())) == most]  # those that did not leave early
    best = min(natives, key=medians.__getitem__) if natives else None
    for name, facts in results.items():
        if name not in times:
            continue
        low, _, high = statistics.quantiles(times[name], n=4)
        facts |= {"ms": _rounded(1e3 * medians[name]), "quartiles_ms": [_rounded(1e3 * low), _rounded(1e3 * high)]}
        facts["rounds"] = len(times[name])
        if name in timing.late:
            facts["late"] = True
        if best is not None:
            facts["to_best_native"] = _rounded(median_ratio(times[name], times[best]))
        facts |= {
            f"to_{floor.replace(' ', '_')}": _rounded(median_ratio(times[name], times[floor])) for floor in floors
        }
    floors_ms = {floor: _rounded(1e3 * medians[floor]) for floor in floors}
    return {"floors_ms": floors_ms, "best_native": best, "results": results}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
