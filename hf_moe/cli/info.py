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
    from hf_moe.loading.adapter_base import is_adapter
    from hf_moe.observability.explain import explain_config

    if is_adapter(model):
        fail(f"{model!r} is a PEFT adapter, which has no config of a model. Describe its base: {_base(model)}.")
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


def _base(adapter: str) -> str:
    from hf_moe.loading.adapter_base import AdapterBaseError, base_of_adapter

    try:
        return f"hf-moe info {base_of_adapter(adapter)}"
    except AdapterBaseError:
        return "hf-moe info MODEL"


def _models_below(folder: Path) -> str:
    names = sorted(str(path.parent) for path in folder.glob("*/config.json"))
    return f", such as {', '.join(names)}" if names else ""
