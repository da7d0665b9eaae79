"""One JSON file of results, written after every case: an interrupted run loses nothing and continues."""

import hashlib
import json
import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hf-moe", "torch", "transformers", "triton", "peft", "liger-kernel", "scattermoe", "kernels")
SOURCES = {"cpu": ("hf_moe/experts", "hf_moe/kernels/cpu"), "cuda": ("hf_moe/experts", "hf_moe/kernels")}


def environment(device: str, threads: int) -> dict[str, Any]:
    """Facts that times of two runs must have in common to stand in one file."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    facts = {"device": _device_name(device), "threads": threads, "versions": versions}
    if device == "cuda":
        facts["cuda"] = torch.version.cuda or torch.version.hip
    else:
        facts["capability"] = torch.backends.cpu.get_cpu_capability()
    return facts


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = dict(line.partition(":")[::2] for line in lines)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    units = " ".join(
        flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "")
    )
    number = " ".join(f"{name} {values.get(name, '?')}" for name in ("cpu family", "model"))
    return f"cpu, {values.get('model name', platform.machine())} ({number}; {units}), {os.cpu_count()} cores"


def source_hash(device: str) -> str:
    """Of the code whose speed is measured: a case counts as measured only for the code that is there now."""
    digest = hashlib.sha256()
    for folder in SOURCES[device]:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".json"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit(device: str) -> str:
    """The checkout's commit; '+' if the measured code differs from it."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", *SOURCES[device]], cwd=ROOT, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


class ResultsError(RuntimeError):
    """The file holds results that must not be mixed with this run's."""


class Results:
    """The file, and what it holds: `header`, and `cases` by key."""

    def __init__(self, path: Path, device: str, facts: dict[str, Any], header: dict[str, Any]):
        self.path, self.device, self.source = path, device, source_hash(device)
        found = json.loads(path.read_text()) if path.exists() else {}
        other = [
            f"{name}: {found[name]} there, {facts[name]} here"
            for name in facts
            if found and found.get(name) != facts[name]
        ]
        if other:
            raise ResultsError(
                f"{path} was measured elsewhere ({'; '.join(other)}): give another --output, or --fresh to start over."
            )
        self.data = {"date": date.today().isoformat()} | facts | header | {"cases": found.get("cases", {})}

    def has(self, key: str, names: list[str]) -> bool:
        """True if `key` was measured for all `names` with the code that is there now."""
        case = self.data["cases"].get(key)
        return case is not None and case["source"] == self.source and set(names) <= set(case["results"])

    def add(self, key: str, case: dict[str, Any]) -> None:
        self.data["cases"][key] = {"source": self.source, "commit": commit(self.device), **case}
        self.write()

    def write(self) -> None:
        write_json(self.path, self.data)


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all: who is interrupted leaves the file that was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n")
    partial.replace(path)
