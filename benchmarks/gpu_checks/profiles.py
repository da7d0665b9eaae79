"""Where a layer's time goes: microseconds and launches of every kernel, by torch's profiler."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hf_moe.kernels.triton.hybrid import triton_hybrid_experts
from hf_moe.kernels.triton.ops import triton_experts, triton_experts_lora

from ..expert_layers.results import write_json
from .checks import ERRORS
from .problems import by_operator, random_factors, random_layer, with_gradients
from .setting import Setting

SHOWN = 25


def profile_layer(setting: Setting, wrong: set[str], output: Path, until: float) -> None:
    """Writes `profile.json`: by case its kernels, those with most time first."""
    found: dict[str, Any] = {}
    for name, (operator, run) in _cases(setting).items():
        if time.time() > until or operator in wrong:
            continue
        try:
            found[name] = _kernels(run, setting.device) or {"failed": "the profiler saw no kernel"}
        except ERRORS as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        write_json(output / "profile.json", found)


def _cases(setting: Setting) -> dict[str, tuple[str, Callable[[], object]]]:
    layer = random_layer(setting.swept, setting.tokens, torch.bfloat16, setting.device)
    few = random_layer(setting.swept, 1, torch.bfloat16, setting.device)
    adapted = {"hidden": layer.hidden, "weights": layer.weights, **random_factors(layer, setting.ranks[0])}
    ours, hybrid = by_operator(layer, triton_experts), by_operator(layer, triton_hybrid_experts)
    cases: dict[str, tuple[str, Callable[[], object]]] = {
        "forward": ("triton", lambda: _without_gradients(lambda: triton_experts(layer.call()))),
        "train": ("triton", lambda: with_gradients(ours, layer.tensors())),
        "lora": ("lora", lambda: with_gradients(by_operator(layer, triton_experts_lora), adapted)),
        "decode, one token": ("decode", lambda: _without_gradients(lambda: triton_experts(few.call()))),
    }
    if setting.device == "cuda":
        cases["train, hybrid"] = ("hybrid", lambda: with_gradients(hybrid, layer.tensors()))
    return cases


def _without_gradients(run: Callable[[], object]) -> object:
    with torch.no_grad():
        return run()


def _kernels(run: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """Averages over several runs; on a CPU, to try it, of torch's operators."""
    on_gpu = device == "cuda"
    repeats = 3 if on_gpu else 1
    run()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiled:
        for _ in range(repeats):
            run()
        if on_gpu:
            torch.cuda.synchronize()
    averages = profiled.key_averages()
    times = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event) for event in averages]
    shown = sorted((pair for pair in times if pair[0] > 0), key=lambda pair: -pair[0])[:SHOWN]
    return [
        {"us": round(us / repeats, 2), "launches": event.count / repeats, "kernel": event.key[:90]}
        for us, event in shown
    ]
