"""Tables of results and of their comparison, for the terminal."""

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_moe.evaluation.paired import ENOUGH_DOCUMENTS

# narrow enough for 80 columns
_WIDEST_NAME = 23
# settings that another model or adapter changes by itself
_OF_THE_WEIGHTS = ("model.parameters", "model.active_parameters", "model.fingerprint")


def print_results(results: Mapping[str, Any]) -> None:
    """Metrics with their standard errors, and the experts that were masked."""
    table = _table(f"{_name(results['model'])}, {results['device']}", "shots", "documents", "value", "stderr")
    for task, entry in results["tasks"].items():
        count = f"{entry['num_samples']:,} of {entry['num_available']:,}"
        _metrics(table, task, entry, str(entry["num_fewshot"]), count)
    for group, entry in results["groups"].items():
        _metrics(table, group, entry, "", f"{len(entry['tasks'])} tasks")
    for domain, entry in results["domains"].items():
        _metrics(table, domain, entry, "", f"{entry['documents']:,}\n{entry['bytes']:,} bytes")
    _console(table).print(table)
    print_masked(results)
    if cut := {
        name: task["truncated_prompts"] for name, task in results["tasks"].items() if task["truncated_prompts"]
    }:
        listed = ", ".join(f"{task} {count:,}" for task, count in cut.items())
        _say(
            f"Prompts longer than the model's context of {results['model']['context']:,} tokens lost their beginning: "
            f"{listed}."
        )


def _metrics(table: Table, name: str, entry: Mapping[str, Any], shots: str, count: str) -> None:
    documents, _, size = count.partition("\n")
    table.add_row(_broken(name), shots, documents, "", "")
    for metric, found in entry["metrics"].items():
        table.add_row(_metric(metric), "", size, number(found["value"]), number(found["stderr"]))
        size = ""


def print_masked(results: Mapping[str, Any]) -> None:
    """Losses of each task and domain without its most used experts."""
    table = _table("Without one expert", "layer, expert", "share", "change\n(95% interval)")
    for kind in ("tasks", "domains"):
        for name, entry in results[kind].items():
            for masked in (entry["experts"] or {"masked": []})["masked"]:
                for metric, found in list(masked["metrics"].items())[:1]:
                    expert = f"{_short(masked['layer'])}, {masked['expert']}"
                    label = f"{_broken(name)}\n{_metric(metric)}"
                    table.add_row(label, expert, f"{masked['share']:.1%}", _interval(found))
    if table.row_count:
        _console(table).print(table)


def print_comparison(comparison: Mapping[str, Any], *, verbose: bool = False) -> None:
    """Paired differences, second minus first, and what was set otherwise.

    Args:
        verbose: Also the settings that an adapter or another model always changes.
    """
    first, second = (_name({**comparison[side], "name": comparison[side]["model"]}) for side in ("first", "second"))
    title = [f"{second} ({comparison['second']['results']})", f"against {first} ({comparison['first']['results']})"]
    table = _table("\n".join(title), "first", "second", "change\n(95% interval)", "real")
    few: dict[str, int] = {}
    for kind in ("tasks", "domains"):
        for name, metrics in comparison[kind].items():
            for metric, found in metrics.items():
                is_few = found["documents"] < ENOUGH_DOCUMENTS
                few |= {name: found["documents"]} if is_few else {}
                label = f"{_broken(name)}, {found['documents']:,} docs\n{_metric(metric)}"
                real = "too few" if is_few else "yes" if found["is_real"] else "no"
                table.add_row(label, number(found["first"]), number(found["second"]), _interval(found), real)
    _console(table).print(table)
    _print_settings(comparison, verbose)
    if comparison["not_compared"]:
        _say(f"Not compared, being in one of them alone or no mean: {', '.join(comparison['not_compared'])}.")
    if few:
        listed = ", ".join(f"{name} {count:,}" for name, count in few.items())
        _say(f"Too few documents to judge ({ENOUGH_DOCUMENTS} are needed): {listed}.")
    _say(
        "Real: the interval of the paired difference excludes 0. Among 20 comparisons without any difference one does "
        "so by chance."
    )


def _print_settings(comparison: Mapping[str, Any], verbose: bool) -> None:
    changed = comparison["set_otherwise"]
    # under the same names, other weights are news
    is_other_model = bool({"model.adapter", "model.name"} & set(changed))
    hidden = [key for key in _OF_THE_WEIGHTS if key in changed and is_other_model and not verbose]
    for key, pair in changed.items():
        if key not in hidden:
            _say(f"{key}: {' → '.join(map(_value, pair))}")
    if hidden:
        names = ", ".join(key.removeprefix("model.") for key in hidden)
        _say(f"Not shown, as an adapter or another model changes them (--verbose shows them): {names}.")


def _value(value: Any) -> str:
    """A setting in words; of a digest its first twelve digits."""
    if isinstance(value, str):
        return value[:12] if len(value) == 64 else value
    return "none" if value is None else f"{value:,}" if type(value) is int else str(value)


def _name(model: Mapping[str, Any]) -> str:
    return model["name"] + (f" with {model['adapter']}" if model["adapter"] else "")


def _metric(key: str) -> str:
    """A metric below the name of its task; lm-eval's filter goes with it, unless there is none."""
    return "\n".join(f"  {line}" for line in _broken(key.removesuffix(",none")).split("\n"))


def _broken(name: str) -> str:
    """A name in lines of at most `_WIDEST_NAME` characters, as far as its underscores and commas allow it."""
    lines = [""]
    for part in re.split(r"(?<=[_,])", name):
        if lines[-1] and len(lines[-1] + part) > _WIDEST_NAME:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _short(layer: str) -> str:
    """The layer's number where its name has one alone: 3 for `model.layers.3.mlp`."""
    numbers = [part for part in layer.split(".") if part.isdigit()]
    return numbers[0] if len(numbers) == 1 else layer


def _interval(found: Mapping[str, Any]) -> str:
    return f"{found['difference']:+.4f}\n{found['low']:+.4f} to {found['high']:+.4f}"


def _console(table: Table) -> Console:
    """Console as wide as the terminal; in a file as wide as the table needs, so that no word is broken."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, console.measure(table).maximum))


def _say(text: str) -> None:
    console = Console()
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)


def _table(title: str, *columns: str) -> Table:
    """A table whose first column holds a task or domain, and below it a metric."""
    table = Table("task, metric", title=title, title_justify="left", title_style="italic")
    for column in columns:
        table.add_column(column, justify="left" if column in ("layer, expert", "real") else "right", overflow="fold")
    return table


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
