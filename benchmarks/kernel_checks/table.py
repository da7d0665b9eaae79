"""The committed table of estimates: written one row a line, and compared with new estimates."""

import json
from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path

from . import devices
from .devices import DEVICES

NOTABLE = 0.01
WORSE = 1.03  # a step's estimate may be this many times the table's
UPDATE = "python benchmarks/ahead_of_time.py --update"
_ASSUMED = ("START_US", "GAP_US", "PRODUCT_FACTOR", "GRADIENT_FACTOR", "STREAMING_FACTOR", "EXPOSED_EPILOGUE")


def write(head: dict, rows: dict[str, list[dict]], path: Path) -> None:
    """One row a line, so that a change shows as the lines it changes."""
    lists = {name: ",\n".join("    " + json.dumps(row) for row in found) for name, found in rows.items()}
    tables = [f'  "{name}": [\n{lines}\n  ]' for name, lines in lists.items()]
    path.write_text(json.dumps(head, indent=2)[:-2] + ",\n" + ",\n".join(tables) + "\n}\n")


def assumptions() -> dict:
    constants = {name.lower(): getattr(devices, name) for name in _ASSUMED}
    return constants | {"devices": {name: asdict(device) for name, device in DEVICES.items()}}


def merged(launches: list[dict]) -> list[dict]:
    """Equal launches of one layer in one row, with how often each mode has it."""
    modes: defaultdict[str, Counter] = defaultdict(Counter)
    for row in launches:
        modes[json.dumps({key: value for key, value in row.items() if key != "mode"})][row["mode"]] += 1
    return [json.loads(row) | {"modes": dict(counts)} for row, counts in modes.items()]


def changes(old: dict[str, list[dict]], new: dict[str, list[dict]], chips: Collection[str]) -> list[str]:
    """Steps whose estimates differ by a percent or more."""
    before, after = _by_step(old["steps"], chips), _by_step(new["steps"], chips)
    return [
        f"{layer} {mode} on {device}: {before[layer, mode, device]:.4g} -> {ms:.4g} ms (estimates)"
        for (layer, mode, device), ms in after.items()
        if abs(ms / before.get((layer, mode, device), ms) - 1) >= NOTABLE
    ]


def worse(old: dict[str, list[dict]], new: dict[str, list[dict]], chips: Collection[str]) -> list[str]:
    """What the table on disk forbids: steps that take longer, and steps that only one of the two knows."""
    before, after = _by_step(old["steps"], chips), _by_step(new["steps"], chips)
    failures = []
    for step in before | after:
        layer, mode, device = step
        where = f"{layer} {mode} on {device}"
        if step not in after:
            failures.append(f"{where}: is in the table, but nothing estimates it. If it is gone for good: {UPDATE}")
        elif step not in before:
            failures.append(f"{where}: is not in the table. Add it: {UPDATE}")
        elif after[step] > WORSE * before[step]:
            change = f"{before[step]:.4g} -> {after[step]:.4g} ms (estimates)"
            cause = _largest_change(old["launches"], new["launches"], step)
            failures.append(f"{where}: {change}, {cause}. Make it as fast, or if that is the price of more: {UPDATE}")
    return failures


def _by_step(rows: list[dict], chips: Collection[str]) -> dict[tuple[str, str, str], float]:
    return {(row["layer"], row["mode"], row["device"]): row["ms"] for row in rows if row["chip"] in chips}


def _largest_change(old: list[dict], new: list[dict], step: tuple[str, str, str]) -> str:
    before, after = _by_kernel(old, *step), _by_kernel(new, *step)
    kernel = max(after, key=lambda name: after[name] - before.get(name, 0.0), default="")
    was, now = before.get(kernel, 0.0), after.get(kernel, 0.0)
    return f"most of it in {kernel} ({was:.4g} -> {now:.4g} ms)" if now > was else "most of it between the launches"


def _by_kernel(rows: list[dict], layer: str, mode: str, device: str) -> dict[str, float]:
    sums: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        if row["layer"] == layer and device in row["ms"]:
            sums[row["kernel"]] += row["ms"][device] * row["modes"].get(mode, 0)
    return sums
