"""hf-moe compare: two models on the same texts"""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe.cli.common import (
    BACKENDS_HELP,
    DTYPES_HELP,
    Adapter,
    ChatTemplate,
    Data,
    Device,
    Gate,
    MaxTokens,
    OnBadRow,
    app,
    check_max_tokens,
    describe_error,
    fail,
    model_and_adapter,
    require,
    tokenizer_of,
)
from hf_moe.io.console import print_to_stderr


@app.command(rich_help_panel="Look")
def compare(
    base: Annotated[str, typer.Argument(help="A model folder, or a name on the Hub.")],
    new: Annotated[
        str | None, typer.Argument(help="The model, or the adapter on BASE, to compare; BASE itself if left out.")
    ] = None,
    adapter: Adapter = None,
    data: Data = None,
    max_tokens: MaxTokens = 10_000,
    on_bad_row: OnBadRow = "error",
    chat_template: ChatTemplate = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens read at once; if left out 1,024, or the smaller context of the two.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help=f"Of BASE: {DTYPES_HELP}")] = "auto",
    dtype_new: Annotated[str, typer.Option(help="Of NEW, likewise.")] = "auto",
    experts_implementation: Annotated[str | None, typer.Option(help=f"Of BASE: {BACKENDS_HELP}")] = None,
    experts_implementation_new: Annotated[str | None, typer.Option(help="Of NEW, likewise.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="One tokenizer for both, in place of their own.")] = None,
    device: Device = None,
    gate: Gate = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for comparison.json and comparison.html, which are replaced.")
    ] = None,
) -> None:
    """Compare two models on the same texts: routing, weights, bits per byte, latency. With --gate it is a test.

    For scores of benchmarks: `hf-moe evaluate` measures them, `hf-moe compare-results` compares those of two runs.
    """
    require("recipes", "datasets", "jinja2", "peft", "pyarrow")
    from hf_moe.comparison.run import ModelChoice, shared_window

    if not data:
        fail("give text to compare on, such as --data law.txt --data code.jsonl, or --data embedded.")
    check_max_tokens(max_tokens)
    (base, base_adapter), (new, adapter) = _sides(base, new, adapter)
    first = (base, base_adapter, dtype, experts_implementation)
    second = (new, adapter, dtype_new, experts_implementation_new)
    if first == second:
        fail("name a second model, or what is different: --adapter, --dtype-new or --experts-implementation-new.")
    try:
        models = ModelChoice(*first, device), ModelChoice(*second, device)
        window, note = shared_window(*models, window)
        if note:
            typer.echo(note)
        options = {"window": window, "batch_size": batch_size, "tokenizer": tokenizer}
        texts = _read(data, max_tokens, tokenizer_of(tokenizer or base, chat_template, adapter), on_bad_row)
        passed = _run(models, texts, options, gate, output)
    except (OSError, RuntimeError, ValueError) as error:
        fail(describe_error(error, base, new, adapter))
    except KeyboardInterrupt:
        fail("interrupted. Nothing was written.", code=130)
    if not passed:
        raise typer.Exit(1)


Side = tuple[str, str | None]


def _sides(base: str, new: str | None, adapter: str | None) -> tuple[Side, Side]:
    """Model and adapter of both sides; an adapter in the place of NEW goes on BASE."""
    from hf_moe.loading.adapter_base import is_adapter

    model, of_base = model_and_adapter(base)
    if new is None:
        return (model, None if adapter is None else of_base), (model, adapter or of_base)
    if not is_adapter(new):
        return (model, of_base), (new, adapter)
    if adapter is not None:
        fail(f"{new!r} is a PEFT adapter, and --adapter names another. Name the model that it goes on.")
    print_to_stderr(f"{new} is a PEFT adapter: it is loaded onto {model}, as by --adapter {new}")
    return (model, of_base), (model, new)


def _read(data: list[str], max_tokens: int, tokenizer: Any, on_bad_row: str) -> dict[str, list[str]]:
    from hf_moe.data.documents import read_domains, sample

    domains = read_domains(data, tokenizer, on_bad_row=on_bad_row)
    return {name: sample(documents, max_tokens, tokenizer()) for name, documents in domains.items()}


def _run(
    models: Any, texts: dict[str, list[str]], options: dict[str, Any], gate: Path | None, output: Path | None
) -> bool:
    from hf_moe.comparison.table import print_comparison, print_verdict
    from hf_moe.observability.thresholds import RoutingThresholds

    thresholds = RoutingThresholds.load(gate) if gate is not None else None
    if thresholds is not None:
        thresholds.require_domains(list(texts))
    comparison = _measure(models, texts, options)
    verdict = thresholds.judge(comparison.metrics()) if thresholds is not None else None
    print_comparison(comparison)
    if verdict is not None:
        print_verdict(verdict)
    if output is not None:
        _write(output, comparison, verdict)
    return verdict is None or verdict.passed


def _measure(models: Any, texts: dict[str, list[str]], options: dict[str, Any]) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
    from transformers.utils.logging import disable_progress_bar

    from hf_moe.comparison.run import compare_models

    disable_progress_bar()
    total = sum(len(text.encode()) for documents in texts.values() for text in documents)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    tasks: dict[int, TaskID] = {}
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def advance(model: int, name: str, num_bytes: int) -> None:
            if model not in tasks:
                tasks[model] = progress.add_task(name, total=total)
            progress.advance(tasks[model], num_bytes)

        return compare_models(models[0], models[1], texts, **options, on_progress=advance)


def _write(output: Path, comparison: Any, verdict: Any) -> None:
    from hf_moe.comparison.page import write_page
    from hf_moe.io.whole_files import write_json

    output.mkdir(parents=True, exist_ok=True)
    record = comparison.to_dict()
    write_json(output / "comparison.json", {**record, "gate": None if verdict is None else verdict.to_dict()})
    write_page(output / "comparison.html", comparison, verdict)
    typer.echo(f"{output / 'comparison.html'}")
