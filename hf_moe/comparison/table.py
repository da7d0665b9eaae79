"""Tables of a comparison and the verdict of its thresholds, for the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from hf_moe.comparison.models import ModelComparison
from hf_moe.comparison.routing import LayerComparison, RoutingComparison
from hf_moe.comparison.weights import LayerDrift
from hf_moe.observability.report.text import short_labels, visible
from hf_moe.observability.thresholds import Verdict

ABSENT = "–"


def print_comparison(comparison: ModelComparison) -> None:
    """Domains, then layers, then what could not be compared."""
    console = Console()
    base, new = (visible(name) for name in comparison.names)
    console.print(f"{new} (new) against {base} (base)", markup=False, highlight=False)
    console.print(_domains(comparison))
    console.print(routing_table(comparison.routing, comparison.drift))
    print_notes(comparison.left_out)


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        Console().print(visible(note, 1000), markup=False, highlight=False)


def print_verdict(verdict: Verdict) -> None:
    console = Console(soft_wrap=True)
    for line in str(verdict).splitlines():
        console.print(visible(line, 2000), markup=False, highlight=False)


def _domains(comparison: ModelComparison) -> Table:
    title = "By domain: bits per byte (lower is better), ms for 1,000 tokens"
    table = _table(title, "domain", "base", "new", "change", "ms", "same\nexperts", "load\nshift")
    for name, record in comparison.to_dict()["domains"].items():
        before, after = record["bits_per_byte"]
        table.add_row(
            Text(visible(name)),
            number(before, 4),
            number(after, 4),
            f"{comparison.bits_change(name):+.4f}",
            " → ".join(number(value, 1) for value in record["milliseconds_per_1k_tokens"]),
            share(record.get("agreement.mean")),
            number(record.get("load_shift.mean"), 4),
        )
    return table


def routing_table(routing: RoutingComparison, drift: Sequence[LayerDrift] = ()) -> Table:
    """One line a layer; overlap stands in where whole sets of experts cannot agree."""
    has_sets = any(layer.agreement is not None for layer in routing.layers)
    has_overlap = any(layer.overlap is not None for layer in routing.layers)
    columns = ["layer", *(["same\nexperts"] if has_sets else ["overlap"] if has_overlap else [])]
    columns += ["load\nshift", "dead", "newly\ndead", "busiest,\nx mean"]
    columns += ["router\nchange", "experts'\nchange"] if drift else []
    title = "By layer, all texts. Load shift: Jensen-Shannon divergence, bits."
    title += "\nChanges: norm of the change over the norm of the base's weights." if drift else ""
    table = _table(title, *columns)
    labels = short_labels([layer.name for layer in routing.layers])
    for position, (label, layer) in enumerate(zip(labels, routing.layers, strict=True)):
        row = [label, *([share(layer.agreement)] if has_sets else [share(layer.overlap)] if has_overlap else [])]
        row += _load_cells(layer)
        row += [percent(drift[position].router), percent(drift[position].experts)] if drift else []
        table.add_row(*map(Text, row))
    return table


def _load_cells(layer: LayerComparison) -> list[str]:
    return [
        number(layer.load_shift, 4),
        f"{len(layer.base.dead_experts)} → {len(layer.new.dead_experts)}",
        experts(layer.newly_dead),
        f"{1 + layer.base.max_violation:.1f} → {1 + layer.new.max_violation:.1f}",
    ]


def share(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1%}"


def percent(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "0%" if value == 0 else "<0.01%" if value < 1e-4 else f"{value:.2%}" if value < 0.1 else f"{value:.0%}"


def number(value: float | str | None, digits: int) -> str:
    return ABSENT if value is None else value if isinstance(value, str) else f"{value:.{digits}f}"


def experts(ids: Sequence[int] | None) -> str:
    """List the experts' numbers, or their count if there are more than four."""
    if ids is None:
        return ABSENT
    return ("none" if not ids else ", ".join(map(str, ids))) if len(ids) <= 4 else f"{len(ids)} experts"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("domain", "layer") else "right", overflow="fold")
    return table
