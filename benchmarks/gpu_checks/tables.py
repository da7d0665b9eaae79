"""Entries of a tile table from a sweep: the fastest tile of every kernel at the swept shapes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_moe.kernels.triton.tiles import FOLDER, read_table

from .sweep import SHIPPED

BITS = "16-bit"
# a change below this is noise of one run
WORTH = 0.02


def table_from(sweep: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The table of `device` (`sm_90`), with an entry for each swept shape whose fastest tile beats the shipped one.

    An entry of the same shape is replaced. Launches that differ in features alone (`up` with and without the stored
    pre-activation) share a shape: the tile with the least sum of their times counts.

    Raises:
        ValueError: If `device` has no table yet: the first one is written by hand.
    """
    path = FOLDER / f"{device}.json"
    if not path.exists():
        raise ValueError(f"{path} does not exist: copy the table of the nearest device, then sweep.")
    table = json.loads(path.read_text())
    for (kernel, shape), times in _times_by_shape(sweep).items():
        best = min(times, key=lambda tile: times[tile])
        if times[best] > (1 - WORTH) * times[SHIPPED]:
            continue
        rows, n, k = shape
        entries = [item for item in table[kernel][BITS] if (item["rows_per_expert"], item["n"], item["k"]) != shape]
        table[kernel][BITS] = [*entries, {"rows_per_expert": rows, "n": n, "k": k, "tile": numbers(best)}]
    return table


def numbers(title: str) -> list[int]:
    """`[block_m, block_n, block_k, warps, stages]` of a title as `products.title` writes it."""
    blocks, warps, stages = title.split(", ")
    return [*map(int, blocks.split("x")), int(warps.split()[0]), int(stages.split()[0])]


def _times_by_shape(sweep: Mapping[str, Any]) -> dict[tuple[str, tuple[int, ...]], dict[str, float]]:
    """Milliseconds by tile of every kernel and shape, summed over the launches that have it; tiles that all had."""
    launches: dict[tuple[str, tuple[int, ...]], list[dict[str, float]]] = {}
    for facts in sweep.values():
        if facts["kernel"] is not None and facts["ms"]:
            launches.setdefault((facts["kernel"], tuple(facts["shape"])), []).append(facts["ms"])
    return {
        key: {tile: sum(ms[tile] for ms in found) for tile in found[0] if all(tile in ms for ms in found)}
        for key, found in launches.items()
    }


def write_table(table: Mapping[str, Any], path: Path) -> None:
    """In the layout of the shipped files, an entry a line; read back, so that what breaks the rules is not written.

    Raises:
        ValueError: As `tiles.read_table`.
    """
    kernels = []
    for kernel, classes in table.items():
        parts = []
        for bits, entries in classes.items():
            lines = ",\n".join("      " + json.dumps(entry) for entry in entries)
            parts.append(f'    "{bits}": [\n{lines}\n    ]')
        kernels.append(f'  "{kernel}": {{\n' + ",\n".join(parts) + "\n  }")
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(kernels) + "\n}\n")
    read_table(partial)
    partial.replace(path)
