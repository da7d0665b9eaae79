"""Every kernel of the tile tables at the size of a real layer, with every tile that is right, side by side."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from hf_moe.kernels.triton.tiles import ROW_TILED

from ..expert_layers.clocks import Clock, Contestant, CpuClock, CudaClock
from ..expert_layers.results import write_json
from ..expert_layers.timing import time_rounds
from .checks import ERRORS, tile_check
from .products import GROUPS, Product, products_of, shipped_tile, tiles_of, title, with_groups, with_tile
from .setting import Setting

SHIPPED = "shipped"


def sweep(setting: Setting, right: set[str], output: Path, until: float) -> None:
    """Writes `sweep.json`: by launch its kernel, shape, shipped tile, and milliseconds by tile.

    With the shipped tile also by the number of row tiles that sweep the columns together.
    """
    clock: Clock = CudaClock() if setting.device == "cuda" else CpuClock()
    found: dict[str, Any] = {}
    for name, product in products_of(setting.swept, setting.tokens, torch.bfloat16, setting.device).items():
        if time.time() > until:
            break
        found[name] = _times(setting, product, right, clock)
        write_json(output / "sweep.json", found)
        print(name, found[name]["ms"], found[name]["ms_by_group"], flush=True)


def _times(setting: Setting, product: Product, right: set[str], clock: Clock) -> dict[str, Any]:
    facts: dict[str, Any] = {"kernel": product.kernel, "shape": product.shape}
    if product.kernel is not None:
        facts["shipped"] = title(shipped_tile(product.kernel, product.shape, setting.device))
    by_tile, by_group = _contestants(setting, product, right)
    failed = _failures(by_tile | by_group)
    able = {name: contestant for name, contestant in (by_tile | by_group).items() if name not in failed}
    seconds, late = time_rounds(able, clock, setting.round_seconds, (SHIPPED,))
    ms = {name: float(f"{1e3 * statistics.median(times):.4g}") for name, times in seconds.items()}
    facts["ms"] = {name: value for name, value in ms.items() if name in by_tile}
    facts["ms_by_group"] = {name: value for name, value in ms.items() if name in by_group}
    return facts | {"late": sorted(late), "failed": failed}


def _contestants(
    setting: Setting, product: Product, right: set[str]
) -> tuple[dict[str, Contestant], dict[str, Contestant]]:
    """The launch as it is and with every right tile, and with other groups of row tiles."""
    kernel, shipped = product.kernel, {SHIPPED: Contestant(product.launch)}
    if kernel is None:
        return shipped, {}
    tiles = [tile for tile in tiles_of(setting, kernel) if tile_check(kernel, tile) in right]
    by_tile = {title(tile): Contestant(with_tile(kernel, tile)(product.launch)) for tile in tiles}
    groups = GROUPS if kernel in ROW_TILED else ()
    by_group = {f"{count} row tiles": Contestant(with_groups(kernel, count)(product.launch)) for count in groups}
    return shipped | by_tile, by_group


def _failures(contestants: dict[str, Contestant]) -> dict[str, str]:
    """Those that do not launch, too much shared memory for one; the others are compiled."""
    failed = {}
    for name, contestant in contestants.items():
        try:
            contestant.run()
        except ERRORS as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    return failed
