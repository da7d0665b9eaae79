"""hf-moe info: a model by its config"""

import json
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from hf_moe.cli.common import app, describe_error, fail

_WIDTH = 80


@app.command(rich_help_panel="Start")
def info(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the Hub (its weights are not read).")],
    gpu: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Memory of a GPU in GiB; may be given several times.", show_default="24, 48, 80 and 141"
        ),
    ] = None,
    row_length: Annotated[int, typer.Option(min=8, help="Tokens of a training row.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that are trained on at a time.")] = 1,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also which backends refuse the model, and how it is counted.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as JSON, sizes in bytes.")] = False,
) -> None:
    """Print a model's size, how its experts run, and the memory that training it takes by each method.

    Reads the config, not the weights, and runs no code of the model. Says whether code that the model carries is out
    of date.
    """
    from hf_moe.hub.renew_code import note_of
    from hf_moe.loading.adapter_base import is_adapter
    from hf_moe.loading.pretrained import read_config
    from hf_moe.observability.explain import explain_config
    from hf_moe.planner.fit import fit
    from hf_moe.planner.fit_table import GPUS, fit_text

    if is_adapter(model):
        fail(f"{model!r} is a PEFT adapter, which has no config of a model. Describe its base: {_base(model)}.")
    if (folder := Path(model)).is_dir() and not (folder / "config.json").exists():
        fail(f"folder {model!r} has no config.json. Name the folder of a model{_models_below(folder)}.")
    try:
        explanation = explain_config(model)
        memory = fit(read_config(model), row_length, batch_size)
        note = note_of(model) if explanation.model_type == "hf_moe" else None
    except (OSError, ValueError) as error:
        fail(describe_error(error, model))
    if as_json:
        typer.echo(json.dumps({"model": explanation.to_dict(), "memory": memory.to_dict(), "note": note}, indent=2))
        return
    typer.echo(_wrapped(explanation.describe(verbose=verbose)))
    typer.echo(f"\n{fit_text(memory, gpu or GPUS, verbose=verbose)}")
    if note is not None:
        typer.echo(_wrapped(f"\nnote: {note}"))


def _wrapped(text: str) -> str:
    """Lines of at most 80 columns; what continues one is indented."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        lines += textwrap.wrap(line, _WIDTH, subsequent_indent=indent, break_on_hyphens=False) or [""]
    return "\n".join(lines)


def _base(adapter: str) -> str:
    from hf_moe.loading.adapter_base import AdapterBaseError, base_of_adapter

    try:
        return f"hf-moe info {base_of_adapter(adapter)}"
    except AdapterBaseError:
        return "hf-moe info MODEL"


def _models_below(folder: Path) -> str:
    names = sorted(str(path.parent) for path in folder.glob("*/config.json"))
    return f", such as {', '.join(names)}" if names else ""
