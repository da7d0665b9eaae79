"""Tables of results and of their comparison, for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_results(results: Mapping[str, Any]) -> None:
    """Metrics with their standard errors, and the experts that were masked."""
    model = results["model"]
    name = model["name"] + (f" with {model['adapter']}" if model["adapter"] else "")
    table = _table(f"{name}, {results['device']}", "task", "shots", "documents", "metric", "value", "stderr")
    for task, entry in results["tasks"].items():
        count = f"{entry['num_samples']:,} of {entry['num_available']:,}"
        _metrics(table, task, entry, str(entry["num_fewshot"]), count)
    for group, entry in results["groups"].items():
        _metrics(table, group, entry, "", f"{len(entry['tasks'])} tasks")
    for domain, entry in results["domains"].items():
        _metrics(table, domain, entry, "", f"{entry['documents']:,}, {entry['bytes']:,} bytes")
    _console().print(table)
    print_masked(results)
    if cut := {
        name: task["truncated_prompts"] for name, task in results["tasks"].items() if task["truncated_prompts"]
    }:
        listed = ", ".join(f"{task} {count:,}" for task, count in cut.items())
        _console().print(
            f"Prompts longer than the model's context of {model['context']:,} tokens lost their beginning: {listed}.",
            highlight=False,
        )


def _metrics(table: Table, name: str, entry: Mapping[str, Any], shots: str, count: str) -> None:
    for metric, found in entry["metrics"].items():
        table.add_row(
            name, shots, count, metric.removesuffix(",none"), number(found["value"]), number(found["stderr"])
        )
        name = shots = count = ""


def print_masked(results: Mapping[str, Any]) -> None:
    """Losses of each task and domain without its most used experts."""
    table = _table(
        "Without one expert (paired, 95% interval)", "task", "layer, expert", "share", "metric", "change", "interval"
    )
    for kind in ("tasks", "domains"):
        for name, entry in results[kind].items():
            for masked in (entry["experts"] or {"masked": []})["masked"]:
                for metric, found in list(masked["metrics"].items())[:1]:
                    expert = f"{_short(masked['layer'])}, {masked['expert']}"
                    share = f"{masked['share']:.1%}"
                    table.add_row(name, expert, share, metric.removesuffix(",none"), *_interval(found))
    if table.row_count:
        _console().print(table)


def print_comparison(comparison: Mapping[str, Any]) -> None:
    """Paired differences, second minus first, and what was set otherwise."""
    names = [f"{comparison[side]['model']} ({comparison[side]['results']})" for side in ("first", "second")]
    table = _table(
        f"{names[1]} against {names[0]}", "task", "documents", "metric", "first", "second", "change", "95%", "real"
    )
    for kind in ("tasks", "domains"):
        for name, metrics in comparison[kind].items():
            for metric, found in metrics.items():
                table.add_row(
                    name,
                    f"{found['documents']:,}",
                    metric.removesuffix(",none"),
                    number(found["first"]),
                    number(found["second"]),
                    *_interval(found),
                    "yes" if found["is_real"] else "no",
                )
    console = _console()
    console.print(table)
    for key, (first, second) in comparison["set_otherwise"].items():
        console.print(f"{key}: {first!r} -> {second!r}", highlight=False, markup=False)
    if comparison["not_compared"]:
        listed = ", ".join(comparison["not_compared"])
        console.print(f"Not compared, being in one of them alone or no mean: {listed}.", highlight=False, markup=False)
    console.print(
        "Real: the interval of the paired difference excludes 0. Among 20 comparisons without any difference one does "
        "so by chance; with fewer than some 20 documents more do, as intervals are then too narrow.",
        highlight=False,
    )


def _short(layer: str) -> str:
    """The layer's number where its name has one alone: 3 for `model.layers.3.mlp`."""
    numbers = [part for part in layer.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else layer


def _interval(found: Mapping[str, Any]) -> tuple[str, str]:
    return f"{found['difference']:+.4f}", f"{found['low']:+.4f} to {found['high']:+.4f}"


def _console() -> Console:
    """Console as wide as the terminal; in a file wide enough that no column is folded."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        text = column in ("task", "metric", "layer, expert")
        table.add_column(column, justify="left" if text else "right", overflow="fold")
    return table


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
