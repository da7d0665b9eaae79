"""What `fit` found, as text for a terminal of 80 columns and as rows of Markdown."""

import textwrap
from collections.abc import Iterator, Sequence

from hf_moe.planner.fit import COMFORT, RESERVE, Fit, MethodFit
from hf_moe.planner.quantised import QuantisedWeights
from hf_moe.planner.step_memory import GIB, size_text

GPUS = (24, 48, 80, 141)
_MARKS = {"yes": "yes", "checkpointing": "gc", "tight": "~", "no": "-", "unknown": "?"}
_WIDTH = 80


def fit_text(fit: Fit, gpus: Sequence[int] = GPUS, *, verbose: bool = False) -> str:
    """The table, and below it what its columns count and leave out."""
    rows = "1 row" if fit.batch_size == 1 else f"{fit.batch_size} rows"
    parts = ("trained", "weights", "grad.", "optim.", "activations", "total")
    lines = [
        f"Memory to train it on one GPU: computed, in GiB; {rows} of {fit.row_length:,} tokens at a time",
        "",
        _row("", ("", "", "", "", "gc/none", "gc"), []) + "  fits a GPU of",
        _row("", parts, [str(gpu) for gpu in gpus]),
        *(_line(each, gpus) for each in fit.methods),
        "",
        *_legend(fit, verbose),
    ]
    return "\n".join(line.rstrip() for line in lines)


def markdown_rows(fit: Fit, gpus: Sequence[int] = GPUS) -> list[str]:
    """A row of Markdown for each method: name, parts, one column for each GPU; without the first bar."""
    return [f"| {' | '.join((each.name, *_parts(each), *_verdicts(each, gpus)))} |" for each in fit.methods]


def _line(each: MethodFit, gpus: Sequence[int]) -> str:
    return _row(each.name, _parts(each), _verdicts(each, gpus))


def _verdicts(each: MethodFit, gpus: Sequence[int]) -> list[str]:
    return [_MARKS[each.verdict(gpu)] for gpu in gpus]


def _parts(each: MethodFit) -> tuple[str, ...]:
    memory, unchecked = each.memory, each.unchecked
    activations = f"{_gib(memory.activations + memory.work)}/{_gib(unchecked.activations + unchecked.work)}"
    return (
        count_text(each.trained),
        _gib(memory.weights),
        _gib(memory.gradients),
        _gib(memory.optimizer),
        activations if each.knows_activations else "?",
        _gib(memory.total) if each.knows_activations else f">{_gib(memory.total)}",
    )


def _row(name: str, parts: Sequence[str], marks: Sequence[str]) -> str:
    widths = (8, 8, 6, 7, 12, 7)
    cells = "".join(f"{part:>{width}}" for part, width in zip(parts, widths, strict=True))
    return f"{name:16}{cells}" + "".join(f"{mark:>4}" for mark in marks)


def _gib(value: int) -> str:
    size = value / GIB
    return f"{size:.1f}" if size < 999.95 else f"{size:,.0f}"


def count_text(number: int) -> str:
    """Parameters in billions or millions."""
    return f"{number / 1e9:.2f}B" if number >= 10**9 else f"{number / 1e6:.1f}M"


def _legend(fit: Fit, verbose: bool) -> Iterator[str]:
    entries = [
        ("gc", "gradient checkpointing; totals are with it"),
        ("yes gc ~ -", f"fits; fits with gc; only just (above {COMFORT:.0%}) with gc; does not fit"),
        ("trained", "parameters, float32 in LoRA and adapter experts"),
    ]
    entries += _details() if verbose else []
    entries.append(("on top", f"the GPU's context ({size_text(RESERVE)} is set aside here), fragments of memory"))
    for name, text in entries:
        yield from textwrap.wrap(f"{name:12}  {text}", _WIDTH, subsequent_indent=" " * 14)
    if fit.quantised is not None:
        yield from ("", *textwrap.wrap(_stored(fit.quantised), _WIDTH))
    for note in fit.notes:
        yield from ("", *textwrap.wrap(f"note: {note}", _WIDTH))


def _details() -> list[tuple[str, str]]:
    return [
        ("weights", "all of them, what is trained included; ESFT holds its experts twice"),
        ("grad. optim.", "gradients, kept over accumulated batches, and AdamW's moments, in the dtype of the trained"),
        ("activations", "what backward needs, logits included, as hf_moe's fused kernels and flash attention keep it"),
        ("ESFT", "the busiest experts of each layer with 20% of its routing: at most so many"),
        ("full", "all weights but the routers"),
    ]


def _stored(weights: QuantisedWeights) -> str:
    if weights.stored is None:
        return weights.note
    return f"The checkpoint is stored in {weights.method}: {size_text(weights.stored)}. {weights.note}"
