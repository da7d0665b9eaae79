"""hf-moe monitor"""

from pathlib import Path
from typing import Annotated

import typer

from hf_moe.cli.common import app, describe_error, fail


@app.command()
def monitor(
    baseline: Annotated[Path, typer.Argument(help="Folder of a routing trace of the model as it should be.")],
    exports: Annotated[
        list[Path],
        typer.Argument(
            help="Expert counts of the serving process, in the order of time: JSON lines, Prometheus text."
        ),
    ],
    gate: Annotated[Path | None, typer.Option(help="A gate file: exit code 1 if a threshold does not hold.")] = None,
    format: Annotated[str, typer.Option(help="auto, jsonl or prometheus.")] = "auto",
    metric: Annotated[
        str, typer.Option(help="The Prometheus counter, with the labels 'layer' and 'expert'.")
    ] = "hf_moe_expert_assignments_total",
    domain: Annotated[str | None, typer.Option(help="Compare with this domain of the baseline alone.")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="Judge this layer alone. Repeatable.")] = None,
    least_per_expert: Annotated[
        float, typer.Option(help="Fewer assignments for an expert, on average, are not judged.")
    ] = 100.0,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the figures, which is replaced.")] = None,
) -> None:
    """Hold the expert counts that a serving process exports to thresholds against a stored routing trace."""
    from hf_moe.comparison.monitor import check_gate
    from hf_moe.comparison.monitor import monitor as compare
    from hf_moe.comparison.served_counts import read_histograms
    from hf_moe.comparison.table import print_notes, print_verdict, routing_table
    from hf_moe.io.whole_files import write_json
    from hf_moe.observability.routing_trace import RoutingTrace
    from hf_moe.observability.thresholds import RoutingThresholds

    try:
        checks = RoutingThresholds.load(gate) if gate is not None else None
        if checks is not None:
            check_gate(checks)
        counts = read_histograms(exports, format=format, metric=metric)
        found = compare(
            RoutingTrace.load(baseline), counts, domain=domain, layers=layer, least_per_expert=least_per_expert
        )
    except (OSError, ValueError) as error:
        fail(describe_error(error))
    verdict = checks.judge(found.figures()) if checks is not None else None
    typer.echo(f"{counts.records:,} records against the baseline {baseline.name}")
    print_table(routing_table(found.comparison))
    print_notes(found.notes)
    if verdict is not None:
        print_verdict(verdict)
    if output is not None:
        write_json(output, {**found.to_dict(), "gate": None if verdict is None else verdict.to_dict()})
    if verdict is not None and not verdict.passed:
        raise typer.Exit(1)


def print_table(table: object) -> None:
    from rich.console import Console

    Console().print(table)
