"""The command: choose cases, measure them one by one, write, report."""

import json
import os
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

from . import contestants as who
from .bench import Bench
from .cases import MODES, Case, Plan, cpu_plan, cuda_plan, quick
from .clocks import DEVICE_CLOCK, Clock, CpuClock, CudaClock
from .correctness import RULE
from .report import PAGE, page_section, plot_ratios, times_table, with_section
from .results import ROOT, Results, ResultsError, environment
from .roofline import Device, floor_of
from .targets import verdict_table, verdicts
from .timing import METHOD, reached

MANY_TOKENS = 512  # from here on a round takes long: twice the budget
RESULTS = ROOT / "benchmarks" / "results"


def parser(description: str | None) -> ArgumentParser:
    found = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--experts", type=int, nargs="+", help="only layers with so many experts")
    found.add_argument("--tokens", type=int, nargs="+", help="only so many tokens")
    found.add_argument("--dtypes", nargs="+", help="only these dtypes")
    found.add_argument("--modes", nargs="+", choices=MODES, help="only these modes")
    found.add_argument("--implementations", nargs="+", help="only these, besides transformers' own")
    found.add_argument("--seconds", type=float, help="of the whole run: then no case begins; the same command goes on")
    found.add_argument("--case-seconds", type=float, help="budget of a case's rounds, doubled for many tokens")
    found.add_argument("--threads", type=int, help="default: every core that the process may use")
    found.add_argument("--quick", action="store_true", help="tiny sizes: does it work?")
    found.add_argument("--fresh", action="store_true", help="forget the results that are there")
    found.add_argument("--output", type=Path, default=RESULTS)
    found.add_argument("--report", action="store_true", help="measure nothing: tables, plots, targets of the results")
    found.add_argument("--page", action="store_true", help="as --report, and write the section of docs/backends.md")
    return found


def run(options: Namespace) -> int:
    """The exit status: 1 if an implementation is wrong or `hf_moe` refuses, 2 if nothing could be measured."""
    console, begin = Console(), time.monotonic()
    if options.report or options.page:
        return report(options, console)
    if options.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda needs a GPU, and torch finds none.", console)
    known = who.contestant_names(options.device)
    if unknown := sorted(set(options.implementations or ()) - set(known)):
        return _refuse(f"--implementations knows {', '.join(known)}, got {', '.join(unknown)}.", console)
    plan = cuda_plan() if options.device == "cuda" else cpu_plan()
    plan = quick(plan) if options.quick else plan
    plan = replace(plan, cases=tuple(case for case in plan.cases if _is_chosen(case, options)))
    if not plan.cases:
        return _refuse("no case of the plan is of these experts, tokens, dtypes and modes.", console)
    plan = replace(plan, case_seconds=options.case_seconds or plan.case_seconds)
    deadline = None if options.seconds is None else begin + options.seconds
    if options.fresh:
        (options.output / f"{plan.name}.json").unlink(missing_ok=True)
    threads = options.threads or len(os.sched_getaffinity(0))
    return run_plan(plan, options.implementations, options.output, threads, deadline, console)


def _refuse(reason: str, console: Console) -> int:
    console.print(reason, style="red", markup=False, soft_wrap=True)
    return 2


def run_plan(
    plan: Plan, chosen: list[str] | None, output: Path, threads: int, deadline: float | None, console: Console
) -> int:
    """Measures what the plan's file in `output` lacks, until `deadline` (time.monotonic); an exit status as `run`."""
    torch.set_num_threads(threads)
    # the contestants of a plan, also where its cases run elsewhere to try them
    names, missing = present("cuda" if plan.name == "experts_cuda" else plan.device, chosen)
    clock = CudaClock() if plan.device == "cuda" else CpuClock()
    header = {"plan": plan.name, "rules": rules(plan.device), "implementations": {"present": names, "absent": missing}}
    if plan.device == "cuda":
        header["reached"] = dict(zip(("tflops", "tbs"), reached(clock, "cuda"), strict=True))
    try:
        results = Results(output / f"{plan.name}.json", plan.device, environment(plan.device, threads), header)
    except ResultsError as error:
        return _refuse(str(error), console)
    failures = measure(plan, names, results, clock, console, deadline)
    for failure in failures:
        console.print(failure, style="red", markup=False, soft_wrap=True)
    return 1 if failures else 0


def report(options: Namespace, console: Console) -> int:
    """Tables, plots and targets of the results that are there; with `--page` the section of docs/backends.md too."""
    plan = "experts_cuda" if options.device == "cuda" else "experts_cpu"
    path = options.output / f"{plan}.json"
    if not path.exists():
        return _refuse(f"{path} does not exist: measure first, or name another --device or --output.", console)
    data = json.loads(path.read_text())
    for path in plot_ratios(data, options.output / "plots"):
        console.print(path, soft_wrap=True)
    for table in (times_table(data), verdict_table(verdicts(data))):
        console.print(table, "\n", markup=False, soft_wrap=True, highlight=False)
    if options.page:
        PAGE.write_text(with_section(PAGE.read_text(), page_section(data)))
    return 0


def present(device: str, chosen: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Names of those that can be called here, natives always; and the others with the reason."""
    import hf_moe  # noqa: F401  registers its implementations

    names = [n for n in who.contestant_names(device) if chosen is None or n in who.NATIVES or n in chosen]
    missing = who.absent(names)
    return [name for name in names if name not in missing], missing


def rules(device: str) -> dict[str, Any]:
    timing = {"timing": METHOD} | ({"clock": DEVICE_CLOCK} if device == "cuda" else {})
    return timing | {"correctness": RULE, "modes": MODES, "floors": who.FLOORS, "skipped": who.SKIPPED}


def measure(
    plan: Plan, names: list[str], results: Results, clock: Clock, console: Console, deadline: float | None = None
) -> list[str]:
    """Measures what `results` lack, until `deadline` (time.monotonic); gives what is wrong in cases of the plan."""
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("experts", total=len(plan.cases))
        for layer, group in groupby(plan.cases, key=lambda case: case.layer):
            bench = Bench(layer, plan.device, clock)
            for case in group:
                progress.update(task, description=case.key)
                if not results.has(case.key, names) and not is_over(deadline):
                    record = bench.measure(case, names, plan.case_seconds * (2 if case.tokens >= MANY_TOKENS else 1))
                    results.add(case.key, record | roofline_of(case, results.data.get("reached")))
                    line = _line(case.key, results.data["cases"][case.key])
                    progress.console.print(line, markup=False, soft_wrap=True, highlight=False)
                progress.advance(task)
    left = [case.key for case in plan.cases if not results.has(case.key, names)]
    if left:
        console.print(f"out of time, cases that are left: {len(left)}. The same command goes on.", markup=False)
    measured = [case.key for case in plan.cases if case.key not in left]
    return [line for key in measured for line in failures_of(key, results.data["cases"][key])]


def is_over(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


def roofline_of(case: Case, speeds: dict[str, float] | None) -> dict[str, float]:
    """The floor on a GPU that reaches `speeds`."""
    if speeds is None:
        return {}
    shape = (case.layer.hidden_size, case.layer.width, case.layer.num_experts, case.layer.top_k)
    return {"roofline_ms": float(f"{floor_of(Device(**speeds), shape, case.tokens, case.mode):.4g}")}


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
