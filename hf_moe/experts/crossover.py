"""From how many rows an expert torch's grouped product is chosen over the fused Triton kernels, by chip.

`crossover.json` holds the chips on which it is one kernel (CUTLASS, TMA); a chip without an entry never crosses over:

    {"sm_90": {"rows_per_expert": 1024, "status": "assumed", "source": "where from", "date": "2026-11-30"}}

`status` is "measured" only after both ways were timed on that chip; `source` then names the result.
"""

import functools
import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("crossover.json")
STATUSES = ("assumed", "measured")


@dataclass(frozen=True)
class Crossover:
    """A chip's threshold, in mean rows an expert, and how it is known."""

    rows_per_expert: int
    status: str
    source: str
    date: str

    def __str__(self) -> str:
        how = "assumed, not measured" if self.status == "assumed" else f"measured on {self.date}"
        return f"{self.rows_per_expert} rows an expert ({how})"


def crossover(device: torch.device, dtype: torch.dtype) -> Crossover | None:
    """The threshold of a device; None where rows decide nothing.

    On CUDA the grouped product is one kernel for bfloat16 on SM90 and SM100 alone; elsewhere it is a loop over experts
    that waits for the GPU (torch's `_grouped_mm_cuda`), which no number of rows makes a good choice.
    """
    if device.type != "cuda" or torch.version.hip is not None or dtype != torch.bfloat16:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return read_crossovers(TABLE).get(f"sm_{major}{minor}")


@functools.cache
def read_crossovers(path: Path) -> dict[str, Crossover]:
    """Read and check the table.

    Raises:
        ValueError: With the file, the value and the rule.
    """
    return {chip: _entry(item, f"{path}: {chip}") for chip, item in json.loads(path.read_text()).items()}


def _entry(item: dict, where: str) -> Crossover:
    keys = {"rows_per_expert", "status", "source", "date"}
    if not isinstance(item, dict) or set(item) != keys:
        raise ValueError(f"{where}: an entry has {sorted(keys)}, got {item!r}.")
    entry = Crossover(**item)
    if type(entry.rows_per_expert) is not int or entry.rows_per_expert < 1:
        raise ValueError(f"{where}: rows_per_expert must be a positive integer, got {entry.rows_per_expert!r}.")
    if entry.status not in STATUSES:
        raise ValueError(f"{where}: status must be one of {', '.join(STATUSES)}, got {entry.status!r}.")
    if not isinstance(entry.source, str) or not entry.source:
        raise ValueError(f"{where}: source must say where the number is from, got {entry.source!r}.")
    try:
        date.fromisoformat(entry.date)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: date must be of the form 2026-11-30, got {entry.date!r}.") from None
    return entry
