"""Every kernel of the tile tables at the size of a real layer, with every tile that is right, side by side."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ..expert_layers.clocks import Clock, Contestant, CpuClock, CudaClock
from ..expert_layers.results import write_json
from ..expert_layers.timing import time_rounds
from .checks import ERRORS, tile_check
from .products import Product, products_of, shipped_tile, tiles_of, title, with_tile
from .setting import Setting

SHIPPED = "shipped"


def sweep(setting: Setting, right: set[str], output: Path, until: float) -> None:
    """Writes `sweep.json`: by launch its kernel, shape, shipped tile, and milliseconds by tile."""
    clock: Clock = CudaClock() if setting.device == "cuda" else CpuClock()
    found: dict[str, Any] = {}
    for name, product in products_of(setting.swept, setting.tokens, torch.bfloat16, setting.device).items():
        if time.time() > until:
            break
        found[name] = _times(setting, product, right, clock)
        write_json(output / "sweep.json", found)
        print(name, found[name]["ms"], flush=True)


def _times(setting: Setting, product: Product, right: set[str], clock: Clock) -> dict[str, Any]:
    contestants, failed = {SHIPPED: Contestant(product.launch)}, {}
    facts: dict[str, Any] = {"kernel": product.kernel, "shape": product.shape}
    if product.kernel is not None:
        facts["shipped"] = title(shipped_tile(product, setting.device))
        for tile in tiles_of(setting, product.kernel):
            if tile_check(product.kernel, tile) in right:
                launch = with_tile(product.kernel, tile)(product.launch)
                contestants[title(tile)] = Contestant(launch)
    for name, contestant in list(contestants.items()):
        try:
            contestant.run()
        except ERRORS as error:  # too much shared memory with this layer's features, for one
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            del contestants[name]
    seconds, late = time_rounds(contestants, clock, setting.round_seconds, (SHIPPED,)) if contestants else ({}, set())
    facts["ms"] = {name: float(f"{1e3 * statistics.median(times):.4g}") for name, times in seconds.items()}
    return facts | {"late": sorted(late), "failed": failed}
