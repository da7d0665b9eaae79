"""hf-moe monitor: a serving process against a stored routing trace"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe.cli.common import Gate, app, describe_error, fail

MIN_PER_EXPERT = 100.0


class Format(StrEnum):
    """Formats of exported counts. No Literal: typer takes it from 0.19 on."""

    auto = "auto"
    jsonl = "jsonl"
    prometheus = "prometheus"


@app.command(rich_help_panel="Look")
def monitor(
    baseline: Annotated[Path, typer.Argument(help="Folder of a routing trace of the model in good health.")],
    exports: Annotated[
        list[Path],
        typer.Argument(help="Expert counts of the serving process, oldest file first: JSON lines, Prometheus text."),
    ],
    gate: Gate = None,
    format: Annotated[
        Format, typer.Option(help="Of the exports; auto goes by the first character of each.")
    ] = Format.auto,
    metric: Annotated[
        str, typer.Option(help="The Prometheus counter, with the labels 'layer' and 'expert'.")
    ] = "hf_moe_expert_assignments_total",
    domain: Annotated[str | None, typer.Option(help="Compare with this domain of the baseline alone.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Judge this layer alone. Repeatable.")] = None,
    min_per_expert: Annotated[
        float, typer.Option(help="Refuse to judge fewer assignments for an expert, on average.")
    ] = MIN_PER_EXPERT,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the metrics, which is replaced.")] = None,
) -> None:
    """Compare the expert counts that a serving process exports with a stored routing trace, and check thresholds."""
    from hf_moe.comparison.served_counts import read_served_counts

    try:
        thresholds = _thresholds(gate)
        counts = read_served_counts(exports, format=format.value, metric=metric)
        found = _compare(baseline, counts, domain=domain, layers=layer, min_per_expert=min_per_expert)
    except (OSError, ValueError) as error:
        fail(describe_error(error))
    verdict = thresholds.judge(found.metrics()) if thresholds is not None else None
    typer.echo(f"{counts.records:,} records against the baseline {baseline.name}")
    _report(found, verdict, output)
    if verdict is not None and not verdict.passed:
        raise typer.Exit(1)


def _thresholds(path: Path | None) -> Any:
    from hf_moe.comparison.monitor import check_thresholds
    from hf_moe.observability.thresholds import RoutingThresholds

    if path is None:
        return None
    thresholds = RoutingThresholds.load(path)
    check_thresholds(thresholds)
    return thresholds


def _compare(baseline: Path, counts: Any, **options: Any) -> Any:
    from hf_moe.comparison.monitor import monitor as compare
    from hf_moe.observability.routing_trace import RoutingTrace

    return compare(RoutingTrace.load(baseline), counts, **options)


def _report(found: Any, verdict: Any, output: Path | None) -> None:
    from rich.console import Console

    from hf_moe.comparison.table import print_notes, print_verdict, routing_table
    from hf_moe.io.whole_files import write_json

    Console().print(routing_table(found.comparison))
    print_notes(found.notes)
    if verdict is not None:
        print_verdict(verdict)
    if output is not None:
        write_json(output, {**found.to_dict(), "gate": None if verdict is None else verdict.to_dict()})
