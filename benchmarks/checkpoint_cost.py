"""What does a safe checkpoint cost: flushing, hashing and checking 1 GB, and looking for NaN at every step?

python benchmarks/checkpoint_cost.py        under 2 minutes
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from expert_layers.results import environment  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

from hf_moe.training.checkpointing.checkpoints import flaw, seal  # noqa: E402
from hf_moe.training.checkpointing.cpu_copy import CpuCopy  # noqa: E402
from hf_moe.training.checkpointing.non_finite import non_finite_weight  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "checkpoint_cost.json"
GIGABYTE = 10**9
ROUNDS = 5


def seconds(work: Callable[..., object], *arguments: object) -> float:
    begin = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - begin


def write(folder: Path, values: torch.Tensor) -> None:
    """As transformers does: a third of it weights, the rest optimizer."""
    third = len(values) // 3
    save_file({"weights": values[:third]}, folder / "model.safetensors")
    torch.save({"moments": values[third:].clone()}, folder / "optimizer.pt")


def checkpoint_seconds(values: torch.Tensor) -> dict[str, float]:
    """Medians of writing, sealing and checking, each on new files that are still in the page cache."""
    found: dict[str, list[float]] = {"write": [], "seal": [], "seal_again": [], "check": []}
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found["write"].append(seconds(write, folder, values))
            found["seal"].append(seconds(seal, folder))
            found["seal_again"].append(seconds(seal, folder))  # all is on the disk: what is left is hashing
            found["check"].append(seconds(flaw, folder))
    medians = {name: round(statistics.median(times), 2) for name, times in found.items()}
    on_disk = round(medians["seal"] - medians["seal_again"], 2)
    return medians | {"of_seal_hashing": medians["seal_again"], "of_seal_disk": on_disk}


def step_microseconds(micro_batches: int) -> float:
    """The check of one step on the CPU."""
    losses = [torch.rand(()) for _ in range(micro_batches + 1)]
    times = [seconds(lambda: CpuCopy(torch.stack([loss.float() for loss in losses])).tolist()) for _ in range(1000)]
    return round(statistics.median(times) * 1e6, 1)


def main() -> None:
    torch.set_num_threads(1)
    values = torch.randn(GIGABYTE // 4)
    model = nn.ParameterList([nn.Parameter(values)])
    look = [seconds(non_finite_weight, model) for _ in range(ROUNDS)]
    result = {
        "date": date.today().isoformat(),
        **environment("cpu", 1),
        "checkpoint_bytes": GIGABYTE,
        "seconds": checkpoint_seconds(values) | {"look_for_nan": round(statistics.median(look), 2)},
        "step_check_microseconds": {f"{count} micro-batches": step_microseconds(count) for count in (1, 8)},
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
