"""hf-moe compare: two models on the same texts"""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe.cli.common import ChatTemplate, OnBadRow, app, describe_error, fail, require, tokenizer_of


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="A model folder, or a name on the Hub.")],
    new: Annotated[str | None, typer.Argument(help="The model to compare with it; BASE itself if left out.")] = None,
    adapter: Annotated[str | None, typer.Option(help="A PEFT adapter on NEW.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text or conversations by domain: what the recipes read, or 'embedded'. Repeatable."),
    ] = None,
    on_bad_row: OnBadRow = "error",
    chat_template: ChatTemplate = None,
    max_bytes: Annotated[
        int, typer.Option(help="Sample size: bytes of each domain, from all over its text.")
    ] = 40_000,
    window: Annotated[
        int | None, typer.Option(help="Tokens read at once; 1,024 or the context of the models.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="Of BASE: auto (as saved), float32, bfloat16, float16.")] = "auto",
    dtype_new: Annotated[str, typer.Option(help="Of NEW.")] = "auto",
    experts_implementation: Annotated[str | None, typer.Option(help="Experts backend of BASE.")] = None,
    experts_implementation_new: Annotated[str | None, typer.Option(help="Experts backend of NEW.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="One tokenizer for both, in place of their own.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")] = None,
    gate: Annotated[
        Path | None, typer.Option(help="A YAML file of thresholds: exit code 1 if one does not hold.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for comparison.json and comparison.html, which are replaced.")
    ] = None,
) -> None:
    """Compare two models on the same texts: routing, weights, bits per byte, latency. With --gate it is a test.

    For benchmark scores: `hf-moe evaluate` measures them, and its --compare compares those of two runs.
    """
    require("recipes", "datasets", "jinja2", "peft", "pyarrow")
    from hf_moe.comparison.run import ModelChoice

    if not data:
        fail("give text to compare on, such as --data law.txt --data code.jsonl, or --data embedded.")
    if new is None and adapter is None and dtype == dtype_new and experts_implementation == experts_implementation_new:
        fail("name a second model, or what is different: --adapter, --dtype-new or --experts-implementation-new.")
    try:
        models = (
            ModelChoice(base, None, dtype, experts_implementation, device),
            ModelChoice(new or base, adapter, dtype_new, experts_implementation_new, device),
        )
        options = {"window": window, "batch_size": batch_size, "tokenizer": tokenizer}
        texts = _read(data, max_bytes, tokenizer_of(tokenizer or base, chat_template), on_bad_row)
        passed = _run(models, texts, options, gate, output)
    except (OSError, RuntimeError, ValueError) as error:
        fail(describe_error(error, base, new, adapter))
    except KeyboardInterrupt:
        fail("interrupted. Nothing was written.", code=130)
    if not passed:
        raise typer.Exit(1)


def _read(data: list[str], max_bytes: int, tokenizer: Any, on_bad_row: str) -> dict[str, list[str]]:
    from hf_moe.comparison.text_probe import evenly_spread
    from hf_moe.evaluation.domains import read_domains

    if max_bytes < 1:
        fail(f"--max-bytes must be at least 1, got {max_bytes}.")
    domains = read_domains(data, tokenizer, on_bad_row=on_bad_row)
    return {name: evenly_spread(documents, max_bytes) for name, documents in domains.items()}


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
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

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
