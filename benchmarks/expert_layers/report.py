"""Show the results: a plot for each layer, and the section of docs/backends.md. Needs matplotlib for the plots."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cases import FORWARD, FROZEN, LORA, TRAIN
from .contestants import DENSE, HF_MOE, STREAM
from .results import ROOT
from .targets import Record, ratio, saved_share

BEGIN, END = "<!-- performance: generated -->", "<!-- performance: end -->"
PAGE = ROOT / "docs" / "backends.md"
JSON = "benchmarks/results/experts_cpu.json"
PLOTS = "benchmarks/results/plots"
SHOWN_EXPERTS = 64
TITLES = {TRAIN: "forward + backward", FROZEN: "forward + backward, frozen experts", LORA: "LoRA"}
LOWEST, HIGHEST = 0.1, 4.0  # of the plots' ratios

# colour, width, and style of a line; ours on top
LINES = {
    "eager": ("#9a9a9a", 1.2, "-"),
    "batched_mm": ("#c9b458", 1.2, "-"),
    "grouped_mm": ("#e07b28", 1.6, "-"),
    "sonicmoe": ("#8a6bb8", 1.2, "-"),
    "deepgemm": ("#b86b8f", 1.2, "-"),
    "liger": ("#c0504d", 1.2, "-"),
    "scattermoe": ("#4aa3a2", 1.2, "-"),
    DENSE: ("#555555", 1.0, ":"),
    STREAM: ("#555555", 1.0, "--"),
    "hf_moe_reference": ("#d8d8d8", 1.2, "-"),
    "hf_moe_grouped": ("#5a9e6f", 1.4, "-"),
    "hf_moe_cpu": ("#86b0dd", 1.4, "-"),
    "hf_moe_triton": ("#86b0dd", 1.4, "-"),
    HF_MOE: ("#2f6db5", 2.4, "-"),
}

# the floors, which are no implementation, in words
LEGEND = {
    DENSE: "dense floor: a dense MLP with as many FLOPs",
    STREAM: "streaming floor: the used experts' bytes, read once",
}


def plot_ratios(data: Mapping[str, Any], folder: Path) -> list[Path]:
    """One figure a layer: time as a multiple of the best native's by tokens; panels by dtype and mode."""
    cases = [record for record in data["cases"].values() if record["routing"] == "uniform"]
    paths = []
    for layer in _distinct(record["layer"] for record in cases):
        path = folder / f"{data['plan']}_{layer['name']}_E{layer['num_experts']}.png"
        _plot_layer(data, layer, [record for record in cases if record["layer"] == layer], path)
        paths.append(path)
    return paths


def _plot_layer(data: Mapping[str, Any], layer: Mapping[str, Any], cases: list[Record], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    dtypes, modes = (_distinct(record[name] for record in cases) for name in ("dtype", "mode"))
    figure = Figure(figsize=(3.6 * len(modes) + 0.4, 2.9 * len(dtypes) + 1.0), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(dtypes), len(modes), squeeze=False, sharex=True, sharey=True)
    handles: dict[str, Any] = {}
    for row, dtype in enumerate(dtypes):
        for column, mode in enumerate(modes):
            panel = [record for record in cases if record["dtype"] == dtype and record["mode"] == mode]
            axis = axes[row][column]
            handles |= _draw(axis, panel)
            axis.set_title(f"{dtype}, {TITLES.get(mode, mode)}", fontsize=10)
            if row == len(dtypes) - 1:
                axis.set_xlabel("tokens")
        axes[row][0].set_ylabel("time / best native")
    order = [name for name in LINES if name in handles]
    lines, labels = [handles[name] for name in order], [LEGEND.get(name, name) for name in order]
    figure.legend(lines, labels, loc="outside lower center", ncols=1 + len(modes), frameon=False, fontsize=9)
    figure.suptitle(
        f"{layer['num_experts']} experts, {layer['top_k']} a token, width {layer['width']}, hidden size "
        f"{layer['hidden_size']}: below 1 is faster\n{data['device']}, {data['threads']} threads, {data['date']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # no Software tag: the same results give the same bytes
    figure.savefig(path, metadata={"Software": None})


def _draw(axis: Any, panel: list[Record]) -> dict[str, Any]:
    """The lines of one panel, by name."""
    axis.axhline(1.0, color="black", linewidth=0.8)
    handles = {}
    for order, (name, (colour, width, style)) in enumerate(LINES.items()):
        points = sorted((record["tokens"], value) for record in panel if (value := _point(record, name)) is not None)
        if not points:
            continue
        tokens, values = zip(*points, strict=True)
        marker = "" if name in (DENSE, STREAM) else "o"
        line = axis.plot(
            tokens, values, style, color=colour, linewidth=width, marker=marker, markersize=3, zorder=3 + order
        )
        handles[name] = line[0]
    ticks = sorted({record["tokens"] for record in panel})
    axis.set(xscale="log", yscale="log", ylim=(LOWEST, HIGHEST))
    axis.set_xticks(ticks, [f"{tick // 1024}k" if tick >= 1024 else str(tick) for tick in ticks], fontsize=8)
    axis.set_xticks([], minor=True)
    levels = (0.1, 0.2, 0.5, 0.7, 1, 2, 4)
    axis.set_yticks(levels, [f"{level:g}" for level in levels], fontsize=8)
    axis.set_yticks([], minor=True)
    axis.grid(axis="y", color="#e8e8e8", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    return handles


def _point(record: Record, name: str) -> float | None:
    """The ratio to the best native; a floor's from the best native's ratio to it."""
    if name not in (DENSE, STREAM):
        return record["results"].get(name, {}).get("to_best_native")
    best = record["results"].get(record["best_native"], {})
    to_floor = best.get(f"to_{name.replace(' ', '_')}")
    return None if to_floor is None else 1 / to_floor


def _distinct(values: Any) -> list[Any]:
    """In order of first appearance."""
    found: list[Any] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def times_table(data: Mapping[str, Any]) -> str:
    """Markdown: milliseconds of every case, and as multiples of the best native's."""
    names = data["implementations"]["present"]
    names = [name for name in names if any("ms" in r["results"].get(name, {}) for r in data["cases"].values())]
    lines = [f"| case | floors, ms | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for key, record in data["cases"].items():
        found = [f"{name.removesuffix(' floor')} {ms:g}" for name, ms in record["floors_ms"].items()]
        found += [f"roofline {record['roofline_ms']:g}"] if "roofline_ms" in record else []
        cells = [_time(record["results"].get(name, {})) for name in names]
        lines.append(f"| {key} | {', '.join(found)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _time(facts: Mapping[str, Any]) -> str:
    if "ms" not in facts:
        return next((kind for kind in ("wrong", "refused", "skipped") if kind in facts), "-")
    ratio_text = f" ({facts['to_best_native']:.2f})" if "to_best_native" in facts else ""
    return f"{facts['ms']:g}{ratio_text}"


def page_section(data: Mapping[str, Any]) -> str:
    """Markdown between the markers: ratios at 64 experts, saved bytes, the worst ratio, links."""
    cases = data["cases"]
    shown = [r for r in cases.values() if r["layer"]["num_experts"] == SHOWN_EXPERTS and r["routing"] == "uniform"]
    layer = shown[0]["layer"]
    columns = [(dtype, mode) for dtype in ("float32", "bfloat16") for mode in (FORWARD, TRAIN)]
    head = [f"{dtype}, {TITLES.get(mode, mode)}" for dtype, mode in columns]
    lines = [
        f"Time of `hf_moe` as a multiple of the best of transformers' own implementations in the same run (below 1 is "
        f"faster): hidden size {layer['hidden_size']}, {layer['num_experts']} experts of width {layer['width']}, "
        f"{layer['top_k']} per token; {_machine(data)}.",
        "",
        f"| tokens | {' | '.join(head)} |",
        "|---:|" + "---:|" * len(columns),
    ]
    for tokens in sorted({record["tokens"] for record in shown}):
        cells = [_cell(shown, tokens, dtype, mode) for dtype, mode in columns]
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    plot = f"{PLOTS}/{data['plan']}_{layer['name']}_E{SHOWN_EXPERTS}.png"
    lines += ["", *_sentences(cases), "", f"[Plot](../{plot}), [every number and the rules](../{JSON})."]
    return "\n".join(lines)


def _cell(shown: list[Record], tokens: int, dtype: str, mode: str) -> str:
    found = [ratio(r) for r in shown if (r["tokens"], r["dtype"], r["mode"]) == (tokens, dtype, mode)]
    return f"{found[0]:.2f}" if found and found[0] is not None else "-"


def _sentences(cases: Mapping[str, Record]) -> list[str]:
    ratios = {key: value for key, record in cases.items() if (value := ratio(record)) is not None}
    shares = [share for r in cases.values() if r["mode"] == TRAIN and (share := saved_share(r)) is not None]
    sentences = []
    if shares:
        sentences.append(
            f"Activations kept for backward: {statistics.median(shares):.0%} of the bytes that `grouped_mm` keeps "
            f"(median; at most {max(shares):.1%})."
        )
    if ratios:
        worst = max(ratios, key=ratios.__getitem__)
        sentences.append(
            f"Over all {len(ratios)} comparisons (sizes, dtypes, with trained and frozen experts) the median is "
            f"{statistics.median(ratios.values()):.2f} and the worst {ratios[worst]:.2f} ({worst})."
        )
    return sentences


def _machine(data: Mapping[str, Any]) -> str:
    versions = data["versions"]
    return (
        f"{data['device']}, {data['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {data['date']}"
    )


def section_of(page: str) -> str:
    """Text between the markers.

    Raises:
        ValueError: If the markers are not there, once each and in order.
    """
    section, found, _ = page.partition(BEGIN)[2].partition(END)
    if not found or page.count(BEGIN) != 1:
        raise ValueError(f"The page must hold '{BEGIN}' and '{END}' once, in this order, on lines of their own.")
    return section.strip("\n")


def with_section(page: str, section: str) -> str:
    """The page with another section between the markers."""
    section_of(page)
    head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    return f"{head}\n{section}\n{tail}"
