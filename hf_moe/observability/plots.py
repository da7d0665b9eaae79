"""Plot a run as PNG or SVG files, by the path's ending. Needs matplotlib, which is imported when one is drawn."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_moe.io.installation import install_command
from hf_moe.observability.layer_statistics import LayerStatistics

BLUE, ORANGE, GREY, INK = "#2f6db5", "#c56a1f", "#777777", "#333333"
# the ramp of the routing page (report/style.css): from an eighth of the even share, over white, to eight times
RAMP = ("#12406f", "#2f6fab", "#86b1d6", "#d3e2ee", "#f3f1ec", "#f6dfc4", "#eaa862", "#c56a1f", "#7c3205")
_OCTAVES, _NO_TOKEN = 3, -99.0  # the ramp's ends as powers of two; and what lies below it, apart from what is small
_FEW = 12  # logged points that are drawn as dots on their line
# inches: at 6.4 letters of 12 points are 9 pixels high on a phone of 390
_WIDE = 6.4


def plot_loss(path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Draw a row per training run: the loss, and beside it how far the busiest expert is from an even load.

    Args:
        curves: The Trainer's training logs by title: records with `step`, `loss` and, if it was logged,
            `moe/max_violation`.
    """
    balanced = any("moe/max_violation" in record for log in curves.values() for record in log)
    columns = 2 if balanced else 1
    with _figure(path, len(curves), columns, width=_WIDE, height=2.9 * len(curves) + 0.2) as (_, axes):
        for row, (title, log) in enumerate(curves.items()):
            losses = [(record["step"], record["loss"]) for record in log]
            _curve(axes[row * columns], losses, BLUE, "training loss")
            axes[row * columns].set(title=title, xlabel="optimizer step", ylabel="nats per token")
            if balanced:
                loads = [(r["step"], 1 + r["moe/max_violation"]) for r in log if "moe/max_violation" in r]
                _busiest(axes[row * columns + 1], loads)


def _busiest(axis: Any, loads: Sequence[tuple[float, float]]) -> None:
    _curve(axis, loads, ORANGE, "busiest expert")
    axis.axhline(1, color=INK, linewidth=1, linestyle="--", label="even load")
    axis.set(title="Routing", xlabel="optimizer step", ylabel="load / even load")
    axis.set_ylim(bottom=min([1.0, *(load for _, load in loads)]) - 0.1)
    axis.legend(frameon=False)


def _curve(axis: Any, points: Sequence[tuple[float, float]], colour: str, label: str) -> None:
    """A line; with dots where the points are few, as one alone would not be seen."""
    steps, values = zip(*points, strict=True) if points else ((), ())
    axis.plot(steps, values, color=colour, label=label, marker="o" if len(points) <= _FEW else None, markersize=5)
    axis.legend(frameon=False)
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=5, min_n_ticks=1)


def plot_bits_per_byte(
    path: Path, values: Mapping[str, Mapping[str, float]], *, new_domain: str | None = None
) -> None:
    """Draw a dumbbell for every domain: bits per byte before and after, joined, with the change beside it.

    Args:
        values: "before" and "after" -> domain -> bits per byte; other variants are not drawn.
    """
    before, after = values["before"], values["after"]
    with _figure(path, 1, 1, width=_WIDE, height=0.5 * len(before) + 1.6) as (figure, (axis,)):
        for row, name in enumerate(before):
            change = round(after[name] - before[name], 3)
            colour = GREY if not change else BLUE if change < 0 else ORANGE
            axis.plot([before[name], after[name]], [row, row], color=colour, linewidth=3, zorder=1)
            text, place = f"{change:+.3f}" if change else "0.000", (max(before[name], after[name]), row)
            axis.annotate(text, place, (11, 0), textcoords="offset points", va="center", color=colour, weight="bold")
        rows = range(len(before))
        ring = {"s": 110, "color": "white", "edgecolor": INK, "linewidth": 1.5}
        axis.scatter(before.values(), rows, **ring, zorder=2, label="before")
        axis.scatter([after[name] for name in before], rows, s=36, color=INK, zorder=3, label="after")
        axis.set_yticks(rows, [f"{name} (new)" if name == new_domain else name for name in before])
        axis.set(xlabel="bits per byte of held-out text (lower is better)")
        axis.invert_yaxis()
        low, high = axis.get_xlim()
        axis.set_xlim(low, high + 0.2 * (high - low))  # room for the last change
        axis.margins(y=0.5 / len(before))
        axis.grid(axis="x", color="#e3e0d9")
        axis.set_axisbelow(True)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)


def plot_layer_load(path: Path, layers: Sequence[LayerStatistics], labels: Sequence[str]) -> None:
    """Draw a heat map: layers by experts, load over the even share on a logarithmic scale, dead experts black."""
    values = _octaves([layer.counts for layer in layers])
    with _figure(path, 1, 1, width=8, height=min(max(0.24 * len(layers) + 1.2, 2.2), 14)) as (figure, (axis,)):
        image = _heat_map(axis, values)
        step = 1 + len(layers) // 41
        axis.set_yticks(range(0, len(layers), step), labels[::step])
        axis.set(title="Load of every expert (black: no token)", xlabel="expert")
        _colour_bar(figure, image, axis)


def _octaves(counts: Sequence[Tensor]) -> Tensor:
    """Rows of `log2(load / even load)`, to three octaves each way; NaN where a row has fewer experts than others."""
    values = torch.full((len(counts), max(map(len, counts))), math.nan)
    for row, each in enumerate(counts):
        octaves = (each.double() * len(each) / each.sum().clamp_min(1)).log2().clamp(-_OCTAVES, _OCTAVES)
        values[row, : len(each)] = octaves.where(each > 0, _NO_TOKEN)
    return values


def _heat_map(axis: Any, octaves: Tensor) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("blue-orange", RAMP).with_extremes(bad="none", under="black")
    axis.spines[:].set_visible(False)
    return axis.imshow(
        octaves.numpy(), aspect="auto", cmap=colours, vmin=-_OCTAVES, vmax=_OCTAVES, interpolation="nearest"
    )


def _colour_bar(figure: Any, image: Any, axes: Any, **options: Any) -> None:
    bar = figure.colorbar(
        image, ax=axes, ticks=range(-_OCTAVES, _OCTAVES + 1), **{"fraction": 0.05, "pad": 0.02} | options
    )
    bar.set_ticklabels(["1/8", "1/4", "1/2", "even", "2", "4", "8"])
    bar.outline.set_visible(False)


def plot_load_histograms(path: Path, layers: Sequence[LayerStatistics], labels: Sequence[str]) -> None:
    """Draw for every layer its experts from the busiest on, load as a multiple of the even share (the line)."""
    columns = min(len(layers), 4)
    rows = -(-len(layers) // columns)
    with _figure(path, rows, columns, width=2.6 * columns + 0.6, height=1.5 * rows + 0.4) as (figure, axes):
        for axis, layer, label in zip(axes, layers, labels, strict=False):
            loads = (layer.load * layer.num_experts).sort(descending=True).values.tolist()
            axis.bar(range(len(loads)), loads, 0.9 if len(loads) < 65 else 1.0, color=BLUE)
            axis.axhline(1, color="#333333", linewidth=0.8, linestyle="--")
            axis.set(title=label, xticks=[], ylim=(0, max(2.0, 1.08 * max(loads))))
            axis.title.set_fontsize(9)
            axis.tick_params(labelsize=8)
        for axis in axes[len(layers) :]:
            axis.set_visible(False)
        figure.supylabel("load / even share", fontsize=9)
        figure.supxlabel("experts, busiest first", fontsize=9)


def plot_expert_load(path: Path, loads: Mapping[str, Sequence[Tensor]], titles: Sequence[str] | None = None) -> None:
    """Draw a heat map per MoE layer: domains by experts, the load over the even load; white is even, black no token.

    Args:
        loads: Domain -> per layer the counts of shape (num_experts,).
        titles: One for each layer; by default they are numbered.
    """
    domains = list(loads)
    layers = [[loads[name][layer] for name in domains] for layer in range(len(loads[domains[0]]))]
    experts = max(len(counts) for layer in layers for counts in layer)
    columns = 2 if len(layers) > 1 and experts <= 32 else 1
    rows = -(-len(layers) // columns)
    with _figure(path, rows, columns, width=_WIDE, height=(0.3 * len(domains) + 0.95) * rows + 0.9) as (figure, axes):
        for place, (axis, layer) in enumerate(zip(axes, layers, strict=False)):
            image = _heat_map(axis, _octaves(layer))
            axis.set_yticks(range(len(domains)), domains if place % columns == 0 else [])
            axis.set(title=titles[place] if titles else f"layer {place}", xticks=range(0, experts, 1 + experts // 9))
            axis.tick_params(length=0)
        for axis in axes[len(layers) :]:
            axis.set_visible(False)
        figure.supxlabel("expert (black: no token)", fontsize=12)
        shown = axes[: len(layers)]
        _colour_bar(figure, image, shown, location="top", label="load / even load", aspect=40, shrink=0.7)


@contextmanager
def _figure(path: Path, rows: int, columns: int, *, width: float, height: float) -> Iterator[tuple[Any, list[Any]]]:
    """A figure that needs no display, and its axes in reading order; written to `path` when the block ends."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib. Install it with: {install_command('recipes')}") from error
    style: dict[Any, Any] = {"font.size": 12, "axes.titlesize": 13, "svg.hashsalt": "hf_moe", "svg.fonttype": "none"}
    with rc_context(style):
        figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        axes = [axis for row in figure.subplots(rows, columns, squeeze=False) for axis in row]
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        yield figure, axes
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # what a link there points to is not written over
        # no tag of software or date, no random ids: the same values give the same bytes
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})
