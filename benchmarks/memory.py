"""Memory that fine-tuning published models takes, computed from their configs: writes results/memory_computed.md.

    python benchmarks/memory.py

Nothing is measured and nothing is loaded: `hf_moe.planner` builds each model, and each method on it, without weights.
`hf-moe info MODEL` prints the same for any model.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from published_models import MODELS, config_of

from hf_moe.planner.fit import Fit, fit
from hf_moe.planner.fit_table import markdown_rows

RESULT = Path(__file__).parent / "results" / "memory_computed.md"
ROW_LENGTH = 2048
HEAD = f"""\
# Memory to fine-tune on one GPU, computed

Computed from the configs by `python benchmarks/memory.py`, not measured: no GPU was at hand. In GiB (2^30 bytes), for
one row of {ROW_LENGTH:,} tokens at a time, with AdamW. `hf-moe info MODEL` prints such a table for any model.

- Base weights are bfloat16; those of DeepSeek-V3 are fp8, as stored, where adapters are trained. LoRA factors and
  adapter experts are float32. Gradients and AdamW's two moments have the dtype of what is trained.
- *Total* is the peak with gradient checkpointing; gradients are accumulated over batches. *Activations* are what
  backward needs, logits included: with gradient checkpointing / without.
- *ESFT* trains 20 % of the experts of every layer, the most that its budget of 0.2 chooses, and holds them twice.
  *Full* trains all weights but the routers, *float32* with everything in float32.
- *yes*: fits a GPU of so many GiB; *gc*: with gradient checkpointing; *~*: only just with it; *-*: does not. 1 GiB is
  set aside for the GPU's context; fragments of memory come on top.

| model | method | trained | weights | gradients | optimizer | activations | total | 24 | 48 | 80 | 141 |
|---|---|---:|---:|---:|---:|---:|---:|---|---|---|---|
"""


def computed(names: list[str]) -> Iterator[tuple[str, Fit]]:
    for name in names:
        yield name, fit(config_of(name), ROW_LENGTH)


def text_of(found: Iterator[tuple[str, Fit]]) -> str:
    rows = [f"| {name} {row}" for name, each in found for row in markdown_rows(each)]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    output = parser.parse_args().output
    output.write_text(text_of(computed(list(MODELS))), encoding="utf-8")
    print(f"wrote {output}")
