"""Plots of a run as PNG files. Needs matplotlib, which is imported when a plot is drawn."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

BLUE, ORANGE, GREY = "#2f6db5", "#e07b28", "#9a9a9a"


def plot_loss(path: Path, curves: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """One panel per training run: the loss, and the largest expert load as a multiple of the mean.

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
    """Grouped bars: for every domain the bits per byte of each variant, lower is better.

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


def plot_expert_load(path: Path, loads: Mapping[str, Sequence[Tensor]]) -> None:
    """A heat map per MoE layer: domains by experts, load as a multiple of the mean (1 = balanced).

    Args:
        loads: Domain -> per layer the counts of shape (num_experts,).
    """
    domains = list(loads)
    layers = len(loads[domains[0]])
    columns = 2 if layers > 1 else 1
    rows = -(-layers // columns)
    figure, axes = _figure(rows, columns, width=5.2 * columns, height=(0.32 * len(domains) + 1.1) * rows)
    shares = [
        [(loads[name][layer] / loads[name][layer].sum()).tolist() for name in domains] for layer in range(layers)
    ]
    relative = [[[value * len(row) for value in row] for row in layer] for layer in shares]
    top = max(value for layer in relative for row in layer for value in row)
    experts = max(len(row) for layer in relative for row in layer)
    image = None
    for layer, axis in enumerate(axes[:layers]):
        image = axis.imshow(relative[layer], aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axis.set_yticks(range(len(domains)), domains)
        axis.set(title=f"MoE layer {layer}", xlabel="expert", xticks=range(0, experts, 1 + experts // 33))
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
        raise ImportError('plots need matplotlib. Install it with: pip install "hf-moe[recipes]"') from error
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [axis for row in figure.subplots(rows, columns, squeeze=False) for axis in row]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # no Software tag: the same figures give the same bytes
    figure.savefig(path, metadata={"Software": None})
