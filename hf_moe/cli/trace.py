"""hf-moe trace: run a model over text, and write its routing as a trace, a page, metrics and plots."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe.cli.common import (
    Adapter,
    Backend,
    ChatTemplate,
    Data,
    Device,
    Dtype,
    MaxTokens,
    Model,
    OnBadRow,
    app,
    check_max_tokens,
    describe_error,
    fail,
    model_and_adapter,
    require,
    tokenizer_of,
)

TRACE, REPORT, METRICS = "trace", "routing.html", "metrics.json"
# larger models get a choice of layers
MOST_PANELS = 12
# rows of the printed table: all layers, or of a deeper model the worst
MOST_ROWS, WORST_ROWS = 8, 5
COLUMNS = ("tokens", "busiest", "dead", "rare", "load_cv", "router_entropy")


class Detail(StrEnum):
    """Detail of a trace. No Literal: typer takes it from 0.19 on."""

    counts = "counts"
    tokens = "tokens"


@app.command(rich_help_panel="Look")
def trace(
    model: Model,
    adapter: Adapter = None,
    data: Data = None,
    by_domain: Annotated[
        bool, typer.Option("--by-domain", help="Each file on its own, or the field 'domain' of its records.")
    ] = False,
    max_tokens: MaxTokens = 10_000,
    detail: Annotated[Detail, typer.Option(help="Sums only, or also the experts of every token.")] = Detail.tokens,
    no_text: Annotated[
        bool, typer.Option("--no-text", help="Store neither text nor ids of tokens, only a hash of each passage.")
    ] = False,
    on_bad_row: OnBadRow = "error",
    chat_template: ChatTemplate = None,
    dtype: Dtype = "auto",
    experts_implementation: Backend = None,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="Folder for page, trace, metrics and plots.")] = Path("trace-output"),
    all_layers: Annotated[
        bool, typer.Option("--all-layers", help="Print every layer; otherwise of more than 8 the worst 5.")
    ] = False,
) -> None:
    """Run a model over text and see its routing: a page to look at, a verdict, metrics and plots."""
    require("recipes", "datasets", "jinja2", "matplotlib", "peft", "pyarrow")
    from hf_moe.comparison.run import ModelChoice

    if not data:
        fail("give text to trace, such as --data law.txt --data code.jsonl, or --data embedded.")
    check_max_tokens(max_tokens)
    if no_text and detail is Detail.counts:
        fail("--no-text is for --detail tokens: counts hold no text.")
    _check_output(output)
    model, adapter = model_and_adapter(model, adapter)
    try:
        choice = ModelChoice(model, adapter, dtype, experts_implementation, device)
        tokenizer = tokenizer_of(choice.path, chat_template, adapter)
        texts = _read(data, by_domain, tokenizer, on_bad_row)
        routing = _trace(choice, tokenizer(), texts, max_tokens, detail.value, audit=no_text)
        _write(output, routing, choice.name)
    except (OSError, RuntimeError, ValueError) as error:
        fail(describe_error(error, model, adapter))
    except KeyboardInterrupt:
        fail("interrupted. Nothing was written.", code=130)
    _print(routing, output, all_layers=all_layers)


def _check_output(output: Path) -> None:
    """Refuse a folder that holds anything but a result of this command."""
    is_free = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_free and not (output / METRICS).is_file():
        fail(f"the folder {str(output)!r} holds something else. Name a new one with --output.")


def _read(paths: Sequence[str], by_domain: bool, tokenizer: Any, on_bad_row: str) -> dict[str, list[str]]:
    from hf_moe.data.documents import read_documents, shuffled

    domains: dict[str, list[str]] = {}
    for path in paths:
        found = read_documents(path, tokenizer, on_bad_row=on_bad_row, by_field=by_domain)
        for name, documents in found.items():
            domains.setdefault(name, []).extend(documents)
    if not by_domain:
        domains = {"text": list(chain.from_iterable(domains.values()))}
    return {name: shuffled(documents) for name, documents in domains.items()}


def _trace(
    choice: Any, tokenizer: Any, texts: dict[str, list[str]], max_tokens: int, detail: Any, *, audit: bool
) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from hf_moe.comparison.run import load_model
    from hf_moe.observability.trace_texts import trace_texts

    disable_progress_bar()
    model: Any = load_model(choice)
    with _progress(model, len(texts) * max_tokens):
        return trace_texts(model, tokenizer, texts, detail=detail, max_tokens=max_tokens, audit=audit)


@contextmanager
def _progress(model: Any, most_tokens: int) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("tokens"), BarColumn(), TextColumn("{task.completed:,.0f}"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=most_tokens)

        def advance(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            progress.advance(task, int(kwargs["attention_mask"].sum()))

        hook = model.register_forward_hook(advance, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


def _write(output: Path, routing: Any, name: str) -> None:
    """Write all files or none."""
    from hf_moe.io.whole_files import whole_folder, write_json

    with whole_folder(output) as folder:
        routing.save(folder / TRACE)
        routing.report(folder / REPORT, name)
        write_json(folder / METRICS, _metrics(routing, name))
        _plot(folder / "plots", routing)


def _metrics(routing: Any, name: str) -> dict[str, Any]:
    """JSON values; what is not known is null."""
    health = routing.health()
    parts = {"all": routing.metrics(), **{f"domain {domain}": routing.metrics(domain) for domain in routing.domains}}
    return {
        "model": name,
        "model_facts": routing.model_facts,
        "health": {
            "verdict": health.verdict,
            "pattern": health.pattern,
            "findings": [vars(finding) for finding in health.findings],
        },
        "metrics": {part: _known(metrics) for part, metrics in parts.items()},
    }


def _known(metrics: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def _plot(folder: Path, routing: Any) -> None:
    from hf_moe.observability.plots import plot_expert_load, plot_layer_load, plot_load_histograms
    from hf_moe.observability.report.text import short_labels

    layers, labels = [routing.statistics(layer) for layer in routing.layers], short_labels(routing.layers)
    plot_layer_load(folder / "layer_load.png", layers, labels)
    plot_load_histograms(folder / "load_histograms.png", layers, labels)
    if len(routing.domains) > 1:
        panels = range(0, len(layers), -(-len(layers) // MOST_PANELS))
        loads = {name: [routing.statistics(layers[i].name, name).counts for i in panels] for name in routing.domains}
        plot_expert_load(folder / "domain_load.png", loads, [labels[i] for i in panels])


def _print(routing: Any, output: Path, *, all_layers: bool) -> None:
    """The layers, the files, what was found, and last the verdict."""
    from rich.console import Console
    from rich.text import Text

    health = routing.health()
    layers = [routing.statistics(layer) for layer in routing.layers]
    console = Console()
    console.print(_table(layers, health, all_layers or len(layers) <= MOST_ROWS))
    for file in (REPORT, METRICS, TRACE, "plots"):
        typer.echo(f"{output / file}")
    for paragraph in health.details():
        console.print(Text(f"\n{paragraph}"), highlight=False)
    console.print(Text(f"\n{health.summary}", style="bold green" if health.healthy else "bold yellow"))


def _table(layers: Sequence[Any], health: Any, every: bool) -> Any:
    """A row a layer; under them what is good."""
    from rich.table import Column, Table

    from hf_moe.observability.report.glossary import LAYER_TERMS, layer_row

    shown = list(layers) if every else _worst(layers, health)
    terms = {key: LAYER_TERMS[key] for key in COLUMNS}
    heads = [Column(term.title[0].lower() + term.title[1:], justify="right") for term in terms.values()]
    table = Table(Column("layer"), *heads, show_footer=True)
    for layer in shown:
        row = layer_row(layer)
        table.add_row(health.label(layer.name), *(row[key] for key in terms), end_section=layer is shown[-1])
    table.columns[0].footer, table.columns[0].footer_style = "good", "dim"
    for column, term in zip(table.columns[1:], terms.values(), strict=True):
        column.footer, column.footer_style = term.good, "dim"
    if len(shown) < len(layers):
        table.caption = f"The worst {len(shown)} of {len(layers)} layers; --all-layers prints the others."
        table.caption_justify = "left"
    return table


def _worst(layers: Sequence[Any], health: Any) -> list[Any]:
    """The layers with the gravest findings, then those with the most uneven load."""
    rank = {layer: place for place, layer in enumerate(dict.fromkeys(each.layer for each in health.findings))}
    uneven = {layer.name: layer.load_cv if layer.counts.any() else 0.0 for layer in layers}
    order = sorted(layers, key=lambda layer: (rank.get(layer.name, len(rank)), -uneven[layer.name]))
    return order[:WORST_ROWS]
