"""Tile sizes of the Triton kernels: shipped tables by device, kernel, dtype and shape.

`tile_for` takes the entry nearest to a shape from `tiles/<device>.json` (`sm_90.json`, `gfx942.json`, ...). A device
without a file gets `tiles/default.json`, small tiles that fit everywhere, and one log line; so does, without the line,
a width that is no multiple of 16. Every tile in these files
is compiled ahead of time for its device, without spills and within its shared memory (benchmarks/ahead_of_time.py).

HF_MOE_AUTOTUNE=1 times the device's tiles at every new shape instead, for the launchers that pass `launch`. Timing
waits for the GPU, so a shape that is new inside of a CUDA graph's capture is an error.
"""

import functools
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "tiles"
KERNELS = ("up", "grouped_linear", "backward_activation", "weight_gradient", "decode_up", "decode_down")
# A layer's kernels may have row tiles of different heights: one launch maps all of them (routing.py). The tile of a
# weight gradient is of no rows, and decode has none.
TILE_HEIGHTS = (16, 32, 64, 128)
ROW_TILED = ("up", "grouped_linear", "backward_activation")
AUTOTUNE = "HF_MOE_AUTOTUNE"
SMALLEST_WIDTH = 128  # of a layer; what is narrower is the rank of an adapter
# Dots of float32 are exact products without tensor cores: their tiles are others.
TABLES = {
    torch.bfloat16: "16-bit",
    torch.float16: "16-bit",
    torch.float32: "32-bit",
    # products are those of 16 bits; a table lists entries where those tiles would leave no registers for scales
    torch.float8_e4m3fn: "8-bit",
}


@dataclass(frozen=True)
class Tile:
    """The work of one program: `block_m` x `block_n` results in steps of `block_k`, by `num_warps` warps.

    Rows are M, output columns N and the reduced dimension K; of a weight gradient M and N are its two dimensions and K
    the rows. `num_stages` loads are in flight at once.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Entry:
    """A tile and the shape it was chosen for."""

    rows_per_expert: int
    n: int
    k: int
    tile: Tile

    def distance(self, rows_per_expert: int, n: int, k: int) -> float:
        pairs = ((rows_per_expert, self.rows_per_expert), (n, self.n), (k, self.k))
        return sum(abs(math.log2(max(actual, 1) / listed)) for actual, listed in pairs)


INTERPRETED = Tile(16, 32, 32, num_warps=4, num_stages=1)


def tile_for(
    kernel: str, rows_per_expert: int, n: int, k: int, dtype: torch.dtype, device: torch.device, *,
    launch: Callable[[Tile], object] | None = None,
) -> Tile:  # fmt: skip
    """The tile of `kernel` for one shape.

    Args:
        kernel: One of `KERNELS`.
        rows_per_expert: Mean number of routed rows, T*K // E.
        n: Output columns (weight gradient: its second dimension).
        k: Reduced dimension (weight gradient: its first dimension).
        dtype: Of the weights, or of both operands.
        device: "cuda", or "cpu" for Triton's interpreter.
        launch: Runs the kernel with a tile, as often as asked. With HF_MOE_AUTOTUNE=1 the fastest tile is searched
            with it, once for each device, dtype, n, k and power of two of rows.

    Raises:
        ValueError: For an unknown kernel or dtype, or a table that breaks its rules.
        RuntimeError: If HF_MOE_AUTOTUNE=1 on a CPU, where a kernel's time means nothing, or for a shape that was not
            timed before the capture of a CUDA graph.
    """
    _check(kernel, dtype)
    if device.type == "cpu":
        if autotune_is_on():
            raise RuntimeError(f"{AUTOTUNE}=1 times kernels on a GPU, got device cpu: unset it to interpret kernels.")
        return INTERPRETED
    shape = (kernel, rows_per_expert, n, k, dtype, device_name(device))
    if launch is None or not autotune_is_on():
        return _nearest(*shape)
    return _fastest(shape, launch)


def autotune_is_on() -> bool:
    value = os.environ.get(AUTOTUNE, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{AUTOTUNE} must be 0 (shipped tiles) or 1 (search), got {value!r}.")
    return value == "1"


@functools.lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """The name of a GPU's table: `sm_90` for compute capability 9.0, `gfx942` for AMD."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def table(name: str) -> dict[str, dict[str, tuple[Entry, ...]]]:
    """The entries for a device by kernel and class of TABLES ("16-bit", ...); the default's for an unknown device."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        known = sorted(file.stem for file in FOLDER.glob("*.json") if file.stem != "default")
        logger.warning(
            "hf_moe has no kernel tiles for %s (only for %s): conservative ones are used. "
            "%s=1 searches for faster ones at the price of slow first steps.",
            name,
            ", ".join(known),
            AUTOTUNE,
        )
        path = FOLDER / "default.json"
    return read_table(path)


def read_table(path: Path) -> dict[str, dict[str, tuple[Entry, ...]]]:
    """Read and check one file: `{kernel: {"16-bit": [{"rows_per_expert", "n", "k", "tile"}], "32-bit": [...]}}`.

    "8-bit" may be left out, it is then as "16-bit". A tile is `[block_m, block_n, block_k, num_warps, num_stages]`.

    Raises:
        ValueError: With the file, the value and the rule.
    """
    content = json.loads(path.read_text())
    if set(content) != set(KERNELS):
        raise ValueError(f"{path} must hold the kernels {sorted(KERNELS)}, got {sorted(content)}: add or rename them.")
    for kernel, classes in content.items():
        classes.setdefault("8-bit", classes.get("16-bit"))
        if set(classes) != set(TABLES.values()) or not all(classes.values()):
            wanted = sorted(set(TABLES.values()))
            raise ValueError(f"{path}: {kernel} must list entries for {wanted} each, got {sorted(classes)}.")
    return {
        kernel: {
            bits: tuple(_entry(item, f"{path}: {kernel}, {bits}", kernel in ROW_TILED) for item in items)
            for bits, items in classes.items()
        }
        for kernel, classes in content.items()
    }


def _entry(item: dict, where: str, row_tiled: bool) -> Entry:
    keys = {"rows_per_expert", "n", "k", "tile"}
    if set(item) != keys or not isinstance(item["tile"], list) or len(item["tile"]) != 5:
        raise ValueError(f"{where}: an entry has {sorted(keys)}, tile with 5 numbers, got {item}.")
    shape = [item["rows_per_expert"], item["n"], item["k"]]
    *powers, _ = item["tile"]
    if not all(isinstance(number, int) and number > 0 for number in (*shape, *item["tile"])):
        raise ValueError(f"{where}: shapes and tiles are positive integers, got {item}.")
    if any(number & (number - 1) for number in powers):
        raise ValueError(f"{where}: blocks and warps must be powers of two (Triton's rule), got tile {item['tile']}.")
    if row_tiled and item["tile"][0] not in TILE_HEIGHTS:
        raise ValueError(f"{where}: block_m must be one of {TILE_HEIGHTS}, got tile {item['tile']}.")
    return Entry(**item | {"tile": Tile(*item["tile"])})


def candidates(kernel: str, dtype: torch.dtype, name: str) -> list[Tile]:
    """Every shipped tile of a kernel on the named device, without repetition."""
    _check(kernel, dtype)
    return list(dict.fromkeys(entry.tile for entry in table(name)[kernel][TABLES[dtype]]))


def _check(kernel: str, dtype: torch.dtype) -> None:
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}.")
    if dtype not in TABLES:
        known = ", ".join(str(known).removeprefix("torch.") for known in TABLES)
        raise ValueError(f"kernels take {known}, got {dtype}: cast the model, or use another experts implementation.")


@functools.lru_cache(maxsize=4096)
def _nearest(kernel: str, rows_per_expert: int, n: int, k: int, dtype: torch.dtype, name: str) -> Tile:
    # rows that begin anywhere in a line of memory are loaded element by element: a chip's wide tiles spill there
    uneven = any(size >= SMALLEST_WIDTH and size % 16 for size in (n, k))
    entries = table("default" if uneven else name)[kernel][TABLES[dtype]]
    return min(entries, key=lambda entry: entry.distance(rows_per_expert, n, k)).tile


_found: dict[tuple, Tile] = {}


def _fastest(shape: tuple, launch: Callable[[Tile], object]) -> Tile:
    kernel, rows_per_expert, n, k, dtype, name = shape
    key = (kernel, max(rows_per_expert, 1).bit_length(), n, k, dtype, name)
    if key not in _found:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"{AUTOTUNE}=1 times {kernel} for {rows_per_expert} rows an expert, which the capture of a CUDA graph "
                "does not allow: run this batch size once before it, or unset it."
            )
        from triton.testing import do_bench

        def milliseconds(tile: Tile) -> float:
            return do_bench(lambda: launch(tile), warmup=10, rep=50)

        times = {tile: milliseconds(tile) for tile in candidates(kernel, dtype, name)}
        _found[key] = min(times, key=lambda tile: times[tile])
        logger.info("hf_moe tuned %s: %s, %.3f ms", key, _found[key], times[_found[key]])
    return _found[key]
