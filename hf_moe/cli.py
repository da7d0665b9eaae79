"""The command `hf-moe`: parses, calls, prints. Heavy imports wait until a command runs."""

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    name="hf-moe",
    help="Mixture-of-Experts for the Hugging Face stack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> None:
    app(args=arguments)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hf-moe {version('hf-moe')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option(help="Folder for the results; a new, empty or interrupted one.")] = Path(
        "quickstart-output"
    ),
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Your own .txt, .md or .jsonl file (field 'text'), or a folder of them. Repeatable."),
    ] = None,
    domain: Annotated[
        str | None, typer.Option(help="The new domain that the adapter learns: one of yours, or an embedded one.")
    ] = None,
    minutes: Annotated[float, typer.Option(help="About how long it may take on 2 cores; sets the steps.")] = 5.0,
    seed: Annotated[int, typer.Option(help="Same seed, same figures on one machine.")] = 0,
) -> None:
    """Train a small MoE on real text, adapt it to a new domain with its router frozen, evaluate, save, load back."""
    _require("recipes", "accelerate", "peft", "tokenizers", "matplotlib", "jinja2")
    from hf_moe.recipes import quickstart as recipe
    from hf_moe.training.corpus import TextError
    from hf_moe.training.stages import RunRefusedError

    chosen = recipe.Quickstart(output=output, data=data or [], domain=domain, minutes=minutes, seed=seed)
    try:
        recipe.main(chosen)
    except (RunRefusedError, TextError) as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted. Give the same command again to continue.", code=130)


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A model folder, or a name on the Hub (only its config is read).")],
) -> None:
    """Print a model's size, its MoE layers, and how its experts run. Reads the config, not the weights."""
    from hf_moe.observability.explain import explain_config

    if (folder := Path(model)).is_dir() and not (folder / "config.json").exists():
        _fail(f"folder {model!r} has no config.json. Name the folder of a model{_models_below(folder)}.")
    try:
        typer.echo(str(explain_config(model)))
    except (OSError, ValueError) as error:
        _fail(str(error))


def _models_below(folder: Path) -> str:
    names = sorted(str(path.parent) for path in folder.glob("*/config.json"))
    return f", such as {', '.join(names)}" if names else ""


def _require(extra: str, *modules: str) -> None:
    from importlib.util import find_spec

    if missing := [name for name in modules if find_spec(name) is None]:
        _fail(f'this command needs {", ".join(missing)}. Install it with: pip install "hf-moe[{extra}]"')


def _fail(message: str, *, code: int = 2) -> NoReturn:
    Console(stderr=True, soft_wrap=True).print(f"error: {message}", markup=False, highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
