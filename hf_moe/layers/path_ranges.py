"""Paths of many layers in few words: "layers.0.mlp", "layers.1.mlp", "layers.3.mlp" -> "layers.0-1,3.mlp"."""

import re
from collections.abc import Iterable


def split_path(name: str) -> tuple[str, int, str]:
    """Before the first number of a path, the number, after it: ("model.layers.", 3, ".mlp"); -1 without a number."""
    match = re.fullmatch(r"((?:.*?\.)?)(\d+)((?:\..*)?)", name)
    return (name, -1, "") if match is None else (match[1], int(match[2]), match[3])


def join_ranges(names: Iterable[str]) -> str:
    """The paths, those that differ in their first number alone together."""
    found: dict[tuple[str, str], list[int]] = {}
    for name in names:
        before, number, after = split_path(name)
        found.setdefault((before, after), []).append(number)
    return ", ".join(
        before if numbers == [-1] else f"{before}{_ranges(sorted(numbers))}{after}"
        for (before, after), numbers in found.items()
    )


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
