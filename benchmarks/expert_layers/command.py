"""The command: choose cases, measure them one by one, write, report."""

import json
import os
from argparse import Namespace
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from . import contestants as who
from .bench import Bench
from .cases import LORA, MODES, Case, cpu_plan, cuda_plan, quick
from .correctness import RULE
from .lora import LORA_OP, lora_op_absent
from .report import README, plot_ratios, readme_section, with_section
from .results import Results, environment
from .targets import verdict_table, verdicts
from .timing import METHOD, Clock, CpuClock, CudaClock


def run(options: Namespace) -> int:
    """The exit status: 1 if an implementation is wrong, or if `hf_moe` refuses."""
    console = Console()
    if options.report or options.readme:
        return report(options, console)
    threads = options.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    plan = cuda_plan() if options.device == "cuda" else cpu_plan()
    plan = quick(plan) if options.quick else plan
    cases = [case for case in plan.cases if _is_chosen(case, options)]
    names, missing = present(plan.device, options.implementations)
    header = {"plan": plan.name, "rules": rules(), "implementations": {"present": names, "absent": missing}}
    path = options.output / f"{plan.name}.json"
    results = Results(path, environment(plan.device, threads), header, fresh=options.fresh)
    clock = CudaClock() if plan.device == "cuda" else CpuClock()
    failures = measure(plan.device, cases, names, results, clock, options.seconds or plan.seconds, console)
    for failure in failures:
        console.print(failure, style="red", markup=False, soft_wrap=True)
    return 1 if failures else 0


def report(options: Namespace, console: Console) -> int:
    """Plots and targets of the results that are there; with `--readme` the README's section too."""
    plan = "experts_cuda" if options.device == "cuda" else "experts_cpu"
    data = json.loads((options.output / f"{plan}.json").read_text())
    for path in plot_ratios(data, options.output / "plots"):
        console.print(path, soft_wrap=True)
    console.print(verdict_table(verdicts(data)), markup=False, soft_wrap=True)
    if options.readme:
        README.write_text(with_section(README.read_text(), readme_section(data)))
    return 0


def present(device: str, chosen: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Names of those that can be called here, natives always; and the others with the reason."""
    import hf_moe  # noqa: F401  registers its implementations

    names = [n for n in who.contestant_names(device) if chosen is None or n in who.NATIVES or n in chosen]
    missing = who.absent(names)
    return [name for name in names if name not in missing], missing


def rules() -> dict[str, Any]:
    return {"timing": METHOD, "correctness": RULE, "modes": MODES, "floors": who.FLOORS, "skipped": who.SKIPPED}


def measure(
    device: str,
    cases: list[Case],
    names: list[str],
    results: Results,
    clock: Clock,
    seconds: float,
    console: Console,
) -> list[str]:
    """Measures what `results` lack; gives what is wrong, in all of `cases`."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("experts", total=len(cases))
        for layer, group in groupby(cases, key=lambda case: case.layer):
            bench = Bench(layer, device, clock)
            for case in group:
                progress.update(task, description=case.key)
                wanted = names + ([LORA_OP] if case.mode == LORA and lora_op_absent() is None else [])
                if not results.has(case.key, wanted):
                    results.add(case.key, bench.measure(case, wanted, seconds))
                    line = _line(case.key, results.data["cases"][case.key])
                    progress.console.print(line, markup=False, soft_wrap=True, highlight=False)
                progress.advance(task)
    return [line for case in cases for line in failures_of(case.key, results.data["cases"][case.key])]


def failures_of(key: str, record: dict[str, Any]) -> list[str]:
    wrong = [f"{key}: {name} is wrong: {r['wrong']}" for name, r in record["results"].items() if "wrong" in r]
    # it picks what runs, so it may never refuse
    refused = record["results"].get(who.HF_MOE, {}).get("refused")
    return wrong + ([f"{key}: {who.HF_MOE} refuses: {refused}"] if refused else [])


def _line(key: str, record: dict[str, Any]) -> str:
    ratios = {name: r.get("to_best_native") for name, r in record["results"].items() if "ms" in r}
    return f"{key}: " + ", ".join(f"{name} {ratio}" for name, ratio in ratios.items())


def _is_chosen(case: Case, options: Namespace) -> bool:
    wanted = (
        (options.experts, case.layer.num_experts),
        (options.tokens, case.tokens),
        (options.dtypes, case.dtype),
        (options.modes, case.mode),
    )
    return all(values is None or value in values for values, value in wanted)
