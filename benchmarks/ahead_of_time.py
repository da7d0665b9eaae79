"""Check that the Triton kernels fit GPUs that nobody has at hand: registers, spills, shared memory, time.

    python benchmarks/ahead_of_time.py                          the shipped tiles, each with its heaviest features
    python benchmarks/ahead_of_time.py --update                 and write the tables in benchmarks/results/
    python benchmarks/ahead_of_time.py --estimates --chip sm_90 the estimated times of the reference layers alone
    python benchmarks/ahead_of_time.py --all                    every tile with every feature, and more chips
    python benchmarks/ahead_of_time.py --chip sm_90 --kernel up --tile 128,128,64,8,3

Compiles what the launchers launch, without a GPU: no kernel may spill or use a stack, shared memory must suffice, and
products must use the chip's tensor cores and asynchronous loads. Then estimates the steps of whole layers from what
they launch: none may be 3 % slower than in results/kernel_estimates.json. Exits with 1 if a rule is broken. The
default takes four minutes on two cores.
"""

import argparse
import dataclasses
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    sys.exit("TRITON_INTERPRET is set, so nothing would be compiled: unset it.")

import torch
from kernel_checks import estimates, rendering, table
from kernel_checks.cases import OTHERS, TILED, Case, Shape
from kernel_checks.compilation import CHIPS, Resources, broken_rules, compile_launch
from kernel_checks.launches import Launch, entry_kernels, recording
from kernel_checks.traffic import FAMILIES
from rich.progress import track

from hf_moe.kernels.triton import tiles
from hf_moe.kernels.triton.tiles import TABLES, Entry, Tile

RESULT = Path(__file__).parent / "results" / "ahead_of_time.json"
ESTIMATES = RESULT.with_name("kernel_estimates.json")
LAYERS = "layers"  # stands for a family where a launch is one of a whole layer
DEFAULT_CHIPS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# of the kernels without a table of tiles: few rows and many
OTHER_SHAPES = (Shape(2, 2048, 2048, torch.bfloat16), Shape(256, 2048, 2048, torch.bfloat16))


@dataclass(frozen=True)
class Job:
    """One launch to compile for one chip, and where it comes from."""

    chip: str
    family: str
    features: str
    dtype: str
    launch: Launch
    in_layer: bool = False  # whether a step of a reference layer launches it

    def title(self) -> str:
        where = f"{self.chip} {self.family} ({self.features}, {self.dtype})"
        return f"{where} {self.launch.kernel} {self.launch.blocks()}"


def jobs_of(chip: str, options: argparse.Namespace) -> Iterator[Job]:
    """The launches that the command line selects, for one chip."""
    for family in options.kernel or [*TILED, *OTHERS]:
        cases = [case for case in (TILED | OTHERS)[family] if case.features in (options.features or [case.features])]
        if family in TILED:
            yield from tiled_jobs(chip, family, cases, options.all)
            continue
        for case, shape in itertools.product(cases, OTHER_SHAPES):
            yield from record(chip, family, case, shape)


def tiled_jobs(chip: str, family: str, cases: list[Case], every_feature: bool) -> Iterator[Job]:
    """Large tiles with all their features; small tiles, and other dtypes, with those that need most registers."""
    dtypes = (torch.bfloat16, torch.float32, *([torch.float16] if every_feature else []))
    jobs = [(case, dtype, TABLES[dtype]) for dtype in dtypes for case in cases if not case.fp8]
    jobs += [(case, torch.bfloat16, "8-bit") for case in cases if case.fp8 and CHIPS[chip].has_fp8]
    for case, dtype, bits in jobs:
        for entry in tiles.table(chip)[family][bits]:
            large = entry.tile.block_m != 16 and min(entry.n, entry.k) > 16 and dtype == torch.bfloat16
            if case.every_tile or large or every_feature:
                shape = Shape(entry.rows_per_expert, entry.n, entry.k, dtype)
                yield from record(chip, family, case, shape, entry)


def layer_jobs(steps: list[estimates.Step]) -> Iterator[Job]:
    """The launches of whole layers that have tiles."""
    for step, launch in estimates.to_compile(steps):
        yield Job(step.chip, LAYERS, f"{step.layer.name}, {step.mode.name}", "bfloat16", launch, in_layer=True)


def distinct(found: list[Job], in_layers: list[Job]) -> list[Job]:
    """Jobs that compile something else each, named after the first."""
    launched = {(job.chip, job.launch.alike()) for job in in_layers}
    jobs = {(job.chip, job.launch.alike()): job for job in reversed([*found, *in_layers])}
    return [dataclasses.replace(job, in_layer=key in launched) for key, job in jobs.items()]


def record(chip: str, family: str, case: Case, shape: Shape, entry: Entry | None = None) -> Iterator[Job]:
    with recording(CHIPS[chip].target, chip) as (calls, asked):
        case.launch(shape)
    if entry is not None and entry.tile not in asked:
        raise SystemExit(f"{family} ({case.features}): the launcher asks for {asked}, not for the table's {entry}.")
    for call in calls:
        yield Job(chip, family, case.features, str(shape.dtype).removeprefix("torch."), call.launch)


def compile_job(job: Job) -> Resources | str:
    """The resources, or the compiler's error."""
    try:
        return compile_launch(job.launch, job.chip, read_loop=job.in_layer)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError) as error:
        return f"does not compile: {type(error).__name__}: {str(error).strip()[-2000:]}"


def compile_all(jobs: list[Job], workers: int) -> dict[Job, Resources | str]:
    with tempfile.TemporaryDirectory() as cache:
        # a cache of earlier compilations says nothing of registers; fusion is what Triton 3.6 to 3.9 do by default
        os.environ.update(TRITON_CACHE_DIR=cache, TRITON_DUMP_PTXAS_LOG="1", TRITON_DEFAULT_FP_FUSION="1")
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(compile_job, job): job for job in jobs}
            done = track(as_completed(futures), f"compile {len(jobs)} kernels", total=len(jobs), transient=True)
            return {futures[future]: future.result() for future in done}


def never_launched(jobs: list[Job]) -> list[str]:
    reached = {(job.launch.module, job.launch.kernel) for job in jobs}
    return [
        f"{module}.{name}: no case launches it. Add one to benchmarks/kernel_checks/cases.py."
        for module, name in sorted(entry_kernels() - reached)
    ]


def without_model() -> list[str]:
    return [
        f"{module}.{name}: nothing says what it reads. Add a line to FAMILIES in benchmarks/kernel_checks/traffic.py."
        for module, name in sorted(entry_kernels())
        if name not in FAMILIES
    ]


def models_that_do_not_fit() -> list[str]:
    """What the models say that they do not know of the launches of whole layers."""
    failures = []
    for step in estimates.steps(["sm_90"]):
        try:
            estimates.work_of_launches(step)
        except (KeyError, ValueError) as error:
            failures.append(f"{step.layer.name}, {step.mode.name}: {error}")
    return failures


def failures_of(results: dict[Job, Resources | str]) -> list[str]:
    failures = []
    for job, found in results.items():
        num_warps = dict(job.launch.options).get("num_warps", 4)
        broken = [found] if isinstance(found, str) else broken_rules(found, job.chip, CHIPS[job.chip], num_warps)
        failures += [f"{job.title()}: {rule}" for rule in broken]
    return sorted(failures)


def rows_of(results: dict[Job, Resources | str]) -> list[dict]:
    rows = []
    for job, found in results.items():
        if isinstance(found, Resources):
            facts = {"chip": job.chip, "kernel": job.launch.kernel, "features": job.features, "dtype": job.dtype}
            facts["tile"] = job.launch.blocks()
            rows.append(facts | dataclasses.asdict(found))
    return sorted(rows, key=lambda row: (row["kernel"], list(CHIPS).index(row["chip"]), row["features"], row["tile"]))


def show(rows: list[dict]) -> None:
    for row in rows:
        limit, loop = CHIPS[row["chip"]].shared_memory, row["loop"]
        of_loop = "" if loop is None else "loop " + " ".join(f"{name} {count}" for name, count in loop.items())
        print(
            f"{row['kernel']:26} {row['chip']:6} {row['dtype']:8} {row['features']:26} {row['tile']:33} "
            f"registers {row['registers']:3} spilled {row['spilled']:4} shared {row['shared_memory']:6}/{limit} "
            f"programs {row['programs']:2} {row['matrix']:22} {of_loop}".rstrip()
        )


def head() -> dict:
    versions = {"python": platform.python_version()} | {name: version(name) for name in ("triton", "torch")}
    return {"date": date.today().isoformat(), "versions": versions}


def write(rows: list[dict], path: Path) -> None:
    limits = {"shared_memory_limits": {name: chip.shared_memory for name, chip in CHIPS.items()}}
    table.write(head() | limits, {"kernels": rows}, path)


def estimate(steps: list[estimates.Step], results: dict[Job, Resources | str]) -> dict[str, list[dict]]:
    """The rows of the table of estimates."""
    needs = {(job.chip, job.launch.alike()): found for job, found in results.items() if isinstance(found, Resources)}
    rows = [estimates.of_step(step, needs) for step in steps]
    totals, launches = ([row for part in parts for row in part] for parts in zip(*rows, strict=True))
    return {"steps": totals, "launches": table.merged(launches)}


def write_estimates(found: dict[str, list[dict]]) -> None:
    table.write(head() | {"assumed": table.assumptions()}, found, ESTIMATES)
    text = rendering.steps_markdown(found["steps"]) + "\n" + rendering.launches_markdown(found["launches"])
    ESTIMATES.with_suffix(".md").write_text(text)


def only_tile(tile: Tile) -> AbstractContextManager:
    """Tables in which every kernel has this one tile."""
    entry = Entry(256, 1024, 1024, tile)
    entries = {kernel: dict.fromkeys(TABLES.values(), (entry,)) for kernel in tiles.KERNELS}
    return mock.patch.object(tiles, "table", return_value=entries)


def tile_of(text: str) -> Tile:
    numbers = text.split(",")
    if len(numbers) != len(dataclasses.fields(Tile)) or not all(map(str.isdigit, numbers)):
        raise argparse.ArgumentTypeError(f"a tile is M,N,K,WARPS,STAGES, such as 128,128,64,8,3, got {text!r}")
    return Tile(*map(int, numbers))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", action="append", choices=sorted(CHIPS), help="only this chip (repeatable)")
    parser.add_argument("--kernel", action="append", choices=[*TILED, *OTHERS], help="only this one (repeatable)")
    parser.add_argument("--features", action="append", help="only cases of this name (repeatable)")
    parser.add_argument("--tile", type=tile_of, help="M,N,K,WARPS,STAGES instead of the shipped tiles")
    parser.add_argument("--all", action="store_true", help="every feature with every tile, and every chip")
    parser.add_argument("--estimates", action="store_true", help="only the launches of whole layers, and their times")
    parser.add_argument("--update", action="store_true", help="write the tables in benchmarks/results/")
    parser.add_argument("--against", type=Path, default=ESTIMATES, help="compare estimates with this table")
    parser.add_argument(
        "--coverage", action="store_true", help="compile nothing: has every kernel a case and a model?"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, help="JSON file for what the kernels need")
    options = parser.parse_args(arguments)
    if not options.against.exists():
        parser.error(f"--against {options.against} does not exist.")
    cases = options.kernel or options.features or options.tile
    if options.estimates and (cases or options.all):
        parser.error("--estimates runs whole layers with the shipped tiles: it goes with --chip alone.")
    if options.update and (cases or options.all or options.estimates or options.chip):
        parser.error("--update writes whole tables: leave out what selects a part.")
    return options


def main(arguments: list[str] | None = None) -> None:
    options, start = parse(arguments), time.perf_counter()
    chips = options.chip or (CHIPS if options.all else DEFAULT_CHIPS)
    with only_tile(options.tile) if options.tile else nullcontext():
        found = [] if options.estimates else [job for chip in chips for job in jobs_of(chip, options)]
    whole = not (options.kernel or options.features or options.tile)
    failures = without_model() + ([] if options.estimates or not whole else never_launched(found))
    if options.coverage:
        failures += models_that_do_not_fit()
    if options.coverage or failures:
        finish(failures)
        return
    steps = list(estimates.steps([chip for chip in chips if chip in DEFAULT_CHIPS])) if whole else []
    results = compile_all(distinct(found, list(layer_jobs(steps))), options.workers)
    failures, rows = failures_of(results), rows_of(results)
    show(rows)
    print(f"{len(rows)} kernels compiled in {time.perf_counter() - start:.0f} s, triton {version('triton')}")
    if options.output and not failures:
        write(rows, options.output)
    if steps and not failures:
        failures = check_estimates(estimate(steps, results), chips, options)
        if options.update:
            write(rows, RESULT)
    finish(failures)


def check_estimates(found: dict[str, list[dict]], chips: Collection[str], options: argparse.Namespace) -> list[str]:
    """Show the estimates, and what changed since another table; write them, or say what got worse."""
    print(rendering.steps_markdown(found["steps"]))
    before = json.loads(options.against.read_text())
    print("\n".join(table.changes(before, found, chips)))
    if options.update:
        write_estimates(found)
        return []
    return table.worse(before, found, chips)


def finish(failures: list[str]) -> None:
    if failures:
        sys.exit("\n".join(["", f"{len(failures)} broken rules:", *failures]))


if __name__ == "__main__":
    main()
