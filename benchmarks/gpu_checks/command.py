"""The stages of a run, one process each, and the summary."""

import importlib
import json
import subprocess
import sys
import time
from argparse import SUPPRESS, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import triton_interpreter

from ..expert_layers.results import write_json
from . import checks, predictions, profiles, sweep, tables
from .facts import facts
from .setting import GPU, TINY, Setting

PROGRAM = Path(__file__).resolve().parents[1] / "gpu_check.py"
# of the time that is left when a stage begins: the later ones need less
SHARES = {"check": 0.42, "times": 0.55, "sweep": 0.7, "profile": 0.9}
# a process that is past its time ends between two cases; then it is stopped
PATIENCE = 20.0
FILES = ("facts", "checks", "experts_cuda", "sweep", "profile")
# of the checks, while they run
LINES = "checks.jsonl"


def parser(description: str | None) -> ArgumentParser:
    found = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    found.add_argument("--output", type=Path, required=True, help="folder of the results")
    found.add_argument("--seconds", type=float, default=440.0, help="of the whole run (default: %(default)g)")
    found.add_argument("--tiny", action="store_true", help="on a CPU, in Triton's interpreter: does it work?")
    found.add_argument("--tiles", metavar="DEVICE", help="run nothing: the tile table of DEVICE after sweep.json")
    # how the command calls itself
    for name in ("--stage", "--part", "--wrong"):
        found.add_argument(name, default="", help=SUPPRESS)
    found.add_argument("--until", type=float, default=0.0, help=SUPPRESS)
    return found


def run(options: Namespace) -> int:
    """The exit status: 1 if something is not right or a stage was stopped, 2 if nothing was run."""
    if options.tiles:
        return write_tiles(options.output, options.tiles)
    if not options.tiny and not torch.cuda.is_available():
        print("This needs a GPU; --tiny runs the same code on a CPU.", file=sys.stderr)
        return 2
    if triton_interpreter.is_on():
        triton_interpreter.repair()
    setting = TINY if options.tiny else GPU
    if options.stage:
        wrong = set(filter(None, options.wrong.split(",")))
        return STAGES[options.stage](setting, options, wrong)
    if there := [name for name in FILES if (options.output / f"{name}.json").exists()]:
        print(f"{options.output} holds {', '.join(there)} of another run: give an empty folder.", file=sys.stderr)
        return 2
    end = time.time() + options.seconds
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "facts.json", facts(setting))
    except OSError as error:
        print(f"results cannot be written: {error}. Give another --output.", file=sys.stderr)
        return 2
    return Run(setting, options, end).all_stages()


def write_tiles(output: Path, device: str) -> int:
    found, path = read(output), output / f"{device}.json"
    measured = found.get("facts", {}).get("tile_table")
    if "sweep" not in found or measured != device:
        what = f"a sweep for {measured}" if "sweep" in found and measured else "no sweep of a GPU"
        print(f"{output} holds {what}, and {device}.json is made from one on that device.", file=sys.stderr)
        return 2
    tables.write_table(tables.table_from(found["sweep"], device), path)
    print(path)
    return 0


def _check(setting: Setting, options: Namespace, wrong: set[str]) -> int:
    checks.run_part(setting, int(options.part), options.output / LINES, options.until)
    return 0


def _times(setting: Setting, options: Namespace, wrong: set[str]) -> int:
    times = importlib.import_module(".times", __package__)  # with transformers and PEFT, which no other stage needs
    return times.time_layer(setting, options.part, wrong, options.output, options.until)


def _sweep(setting: Setting, options: Namespace, wrong: set[str]) -> int:
    if "triton" in wrong:
        print("no sweep: every tile is compared with the shipped one, and triton is wrong", flush=True)
        return 0
    right = {record["name"] for record in read(options.output)["checks"] if record["objection"] is None}
    sweep.sweep(setting, right, options.output, options.until)
    return 0


def _profile(setting: Setting, options: Namespace, wrong: set[str]) -> int:
    profiles.profile_layer(setting, wrong, options.output, options.until)
    return 0


STAGES: Mapping[str, Callable[[Setting, Namespace, set[str]], int]] = {
    "check": _check,
    "times": _times,
    "sweep": _sweep,
    "profile": _profile,
}


def read(output: Path) -> dict[str, Any]:
    """The files of a run that are there, by name."""
    paths = {name: output / f"{name}.json" for name in FILES}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}


@dataclass
class Run:
    """The stages one after the other, each with its share of the time that is left."""

    setting: Setting
    options: Namespace
    end: float
    lines: list[str] = field(default_factory=list)
    failed: bool = False
    stopped: set[int] = field(default_factory=set)  # parts of the checks

    def all_stages(self) -> int:
        output = self.options.output
        try:
            wrong = self._checked()
            self._stage("times", self.setting.layers(), wrong)
            self._stage("sweep", [""], wrong)
            self._stage("profile", [""], wrong)
        except KeyboardInterrupt:
            self.failed = True
            self.lines.append("stopped from outside: the rest was not run")
        self.lines += summary(read(output))
        (output / "summary.txt").write_text("\n".join(self.lines) + "\n")
        print("\n".join(self.lines), flush=True)
        return 1 if self.failed else 0

    def _checked(self) -> str:
        """Operators that are wrong, with commas between them."""
        output = self.options.output
        try:
            self._stage("check", [str(part) for part in range(self.setting.check_processes)], side_by_side=True)
        finally:
            found = checks.collected(self.setting, output / LINES, self.stopped)
            wrong = ",".join(sorted(checks.wrong_operators(found)))
            self._say_checks(found, wrong)
            write_json(output / "checks.json", found)
            (output / LINES).unlink(missing_ok=True)
        return wrong

    def _stage(self, name: str, parts: list[str], wrong: str = "", side_by_side: bool = False) -> None:
        begin = time.time()
        until = begin + SHARES[name] * max(self.end - begin, 0.0)
        started: list[tuple[str, subprocess.Popen]] = []
        try:
            for at, part in enumerate(parts):
                # of parts in a row, each may take half of what is left, the last all of it
                is_free = side_by_side or at == len(parts) - 1
                own = until if is_free else time.time() + max(until - time.time(), 0.0) / 2
                started.append((part, self._start(name, part, wrong, own)))
                if not side_by_side:
                    self._wait(name, *started[-1], own)
            for part, process in started if side_by_side else ():
                self._wait(name, part, process, until)
        finally:
            for _, process in started:
                process.kill()
                process.wait()
            self.lines.append(f"{name}: {time.time() - begin:.0f} s")

    def _start(self, name: str, part: str, wrong: str, until: float) -> subprocess.Popen:
        command = [sys.executable, PROGRAM, "--output", self.options.output, "--stage", name, "--part", part]
        command += ["--wrong", wrong, "--until", until, *(["--tiny"] if self.options.tiny else [])]
        return subprocess.Popen([str(word) for word in command])

    def _wait(self, name: str, part: str, process: subprocess.Popen, until: float) -> None:
        try:
            status = process.wait(max(until + PATIENCE - time.time(), 1.0))
            what = "" if status == 0 else f"ended with {status}"
        except subprocess.TimeoutExpired:
            process.kill()
            what = "was stopped: out of time"
            if name == "check":
                self.stopped.add(int(part))
        if what:
            self.failed = True
            self.lines.append(f"{name} {part} {what}")

    def _say_checks(self, found: list[checks.Found], wrong: str) -> None:
        objections = [record for record in found if record["objection"] is not None]
        self.failed |= bool(objections)
        self.lines.append(f"{len(found) - len(objections)} of {len(found)} checks right; not timed: {wrong or 'none'}")
        for record in objections:
            label = "NOT RIGHT " if checks.was_judged(record) else ""
            self.lines.append(f"    {label}{record['name']}: {record['objection']}")
        print("\n".join(self.lines), flush=True)


def summary(found: Mapping[str, Any]) -> list[str]:
    """Times of every case and launch in milliseconds, and the predictions that did not hold."""
    lines = []
    for key, case in found.get("experts_cuda", {}).get("cases", {}).items():
        floor = f" (at least {case['roofline_ms']:g})" if "roofline_ms" in case else ""
        shown = [f"{name} {_time(result)}" for name, result in case["results"].items()]
        lines.append(f"{key}{floor}: {', '.join(shown)}")
    for launch, result in found.get("sweep", {}).items():
        best = sorted(result["ms"].items(), key=lambda pair: pair[1])[:4]
        shipped = f" (shipped: {result['shipped']})" if "shipped" in result else ""
        lines.append(f"{launch}{shipped}: " + "; ".join(f"{tile} {ms:g}" for tile, ms in best))
    device = found["facts"]["device"]
    held = predictions.report(predictions.verdicts(found, device))
    return lines + (
        held or [f"predictions for {device}: {predictions.number_for(device)} were made, none was measured"]
    )


def _time(result: Mapping[str, Any]) -> str:
    if "ms" not in result:
        return next((kind for kind in ("wrong", "refused", "skipped") if kind in result), "-")
    return f"{result['ms']:g}" + (" (late)" if result.get("late") else "")
