"""hf-moe info: a model by its config"""

from pathlib import Path
from typing import Annotated

import typer

from hf_moe.cli.common import app, describe_error, fail


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the Hub (its weights are not read).")],
) -> None:
    """Print a model's size, its MoE layers, how its experts run, and whether code that it carries is out of date.

    Reads the config, not the weights; runs no code of the model.
    """
    from hf_moe.hub.renew_code import note_of
    from hf_moe.observability.explain import explain_config

    if (folder := Path(model)).is_dir() and not (folder / "config.json").exists():
        fail(f"folder {model!r} has no config.json. Name the folder of a model{_models_below(folder)}.")
    try:
        explanation = explain_config(model)
        typer.echo(str(explanation))
        note = note_of(model) if explanation.model_type == "hf_moe" else None
        if note is not None:
            typer.echo(f"\nnote: {note}")
    except (OSError, ValueError) as error:
        fail(describe_error(error, model))


def _models_below(folder: Path) -> str:
    names = sorted(str(path.parent) for path in folder.glob("*/config.json"))
    return f", such as {', '.join(names)}" if names else ""
