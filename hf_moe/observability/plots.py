"""Plot a run as PNG or SVG files, by the path's ending. Needs matplotlib, which is imported when one is drawn."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_moe.io.installation import install_command
from hf_moe.observability.layer_statistics import LayerStatistics

BLUE, ORANGE, GREY = "#2f6db5", "#e07b28", "#9a9a9a"
BLUE_TO_ORANGE = ("#12406f", "#2f6fab", "#86b1d6", "#f3f1ec", "#eaa862", "#c56a1f", "#7c3205")


def plot_loss(path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Draw a panel per training run: the loss, and the largest expert load as a multiple of the mean.

    Args:
        curves: The Trainer's training logs by title: records with `step`, `loss` and, if it was logged,
            `moe/max_violation`.
    """
    figure, axes = _figure(1, len(curves), width=4.6 * len(curves), height=3.4)
    for axis, (title, log) in zip(axes, curves.items(), strict=True):
        steps = [record["step"] for record in log]
        axis.plot(steps, [record["loss"] for record in log], color=BLUE, label="loss")
        axis.set(title=title, xlabel="optimizer step", ylabel="training loss (nats per token)")
        axis.yaxis.label.set_color(BLUE)
        if all("moe/max_violation" in record for record in log):
            load = axis.twinx()
            load.plot(steps, [1 + record["moe/max_violation"] for record in log], color=ORANGE, linewidth=1)
            load.set_ylabel("largest expert load / mean load")
            load.set_ylim(bottom=1)
            load.yaxis.label.set_color(ORANGE)
            load.spines["top"].set_visible(False)
    _save(figure, path)


def plot_bits_per_byte(
    path: Path, values: Mapping[str, Mapping[str, float]], *, new_domain: str | None = None
) -> None:
    """Draw grouped bars: for every domain the bits per byte of each variant, lower is better.

    Args:
        values: Variant -> domain -> bits per byte.
    """
    variants, domains = list(values), list(next(iter(values.values())))
    colours = dict(zip(variants, (GREY, ORANGE, BLUE, "#5a9e6f"), strict=False))
    figure, (axis,) = _figure(1, 1, width=max(7, 1.6 * len(domains) + 1.5), height=3.8)
    width = 0.8 / len(variants)
    for position, variant in enumerate(variants):
        centres = [place + (position - (len(variants) - 1) / 2) * width for place in range(len(domains))]
        bars = axis.bar(
            centres, [values[variant][name] for name in domains], width * 0.94, label=variant, color=colours[variant]
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    labels = [f"{name}\n(new)" if name == new_domain else name for name in domains]
    axis.set_xticks(range(len(domains)), labels)
    axis.set(
        ylabel="bits per byte of held-out text", title="Held-out text before and after adaptation (lower is better)"
    )
    axis.margins(y=0.22)
    axis.legend(ncols=len(variants), frameon=False, loc="upper center")
    _save(figure, path)


def plot_layer_load(path: Path, layers: Sequence[LayerStatistics], labels: Sequence[str]) -> None:
    """Draw a heat map: layers by experts, load over the even share on a logarithmic scale, dead experts black."""
    values = torch.full((len(layers), max(layer.num_experts for layer in layers)), math.nan)
    for row, layer in enumerate(layers):
        octaves = (layer.load * layer.num_experts).log2()
        # far below the scale, apart from what is only small
        values[row, : layer.num_experts] = octaves.clamp(-3, 3).where(layer.counts > 0, -99.0)
    figure, (axis,) = _figure(1, 1, width=8, height=min(max(0.24 * len(layers) + 1.2, 2.2), 14))
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("blue-orange", BLUE_TO_ORANGE).with_extremes(bad="none", under="black")
    image = axis.imshow(values.numpy(), aspect="auto", cmap=colours, vmin=-3, vmax=3, interpolation="nearest")
    step = 1 + len(layers) // 41
    axis.set_yticks(range(0, len(layers), step), labels[::step])
    axis.set(title="Load of every expert (black: no token)", xlabel="expert")
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, ticks=range(-3, 4), fraction=0.05, pad=0.02)
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "even", "2", "4", "8"])
    _save(figure, path)


def plot_load_histograms(path: Path, layers: Sequence[LayerStatistics], labels: Sequence[str]) -> None:
    """Draw for every layer its experts from the busiest on, load as a multiple of the even share (the line)."""
    columns = min(len(layers), 4)
    rows = -(-len(layers) // columns)
    figure, axes = _figure(rows, columns, width=2.6 * columns + 0.6, height=1.5 * rows + 0.4)
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
    _save(figure, path)


def plot_expert_load(path: Path, loads: Mapping[str, Sequence[Tensor]], titles: Sequence[str] | None = None) -> None:
    """Draw a heat map per MoE layer: domains by experts, load as a multiple of the mean (1 = balanced).

    Args:
        loads: Domain -> per layer the counts of shape (num_experts,).
        titles: One for each layer; by default they are numbered.
    """
    domains = list(loads)
    layers = len(loads[domains[0]])
    titles = titles or [f"MoE layer {layer}" for layer in range(layers)]
    columns = 2 if layers > 1 else 1
    rows = -(-layers // columns)
    figure, axes = _figure(rows, columns, width=5.2 * columns, height=(0.32 * len(domains) + 1.1) * rows)
    shares = [
        [(loads[name][layer] / loads[name][layer].sum().clamp_min(1)).tolist() for name in domains]
        for layer in range(layers)
    ]
    relative = [[[value * len(row) for value in row] for row in layer] for layer in shares]
    top = max(value for layer in relative for row in layer for value in row)
    experts = max(len(row) for layer in relative for row in layer)
    image = None
    for layer, axis in enumerate(axes[:layers]):
        image = axis.imshow(relative[layer], aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axis.set_yticks(range(len(domains)), domains)
        axis.set(title=titles[layer], xlabel="expert", xticks=range(0, experts, 1 + experts // 33))
        axis.spines[:].set_visible(False)
    for axis in axes[layers:]:
        axis.set_visible(False)
    figure.colorbar(image, ax=axes, label="load / mean load", fraction=0.04, pad=0.02)
    _save(figure, path)


def _figure(rows: int, columns: int, *, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure that needs no display, and its axes in reading order."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"plots need matplotlib. Install it with: {install_command('recipes')}") from error
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [axis for row in figure.subplots(rows, columns, squeeze=False) for axis in row]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    from matplotlib import rc_context

    # no tag of software or date, no random ids: the same values give the same bytes
    path.unlink(missing_ok=True)  # what a link there points to is not written over
    is_svg = path.suffix == ".svg"
    with rc_context({"svg.hashsalt": "hf_moe", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None} if is_svg else {"Software": None})
