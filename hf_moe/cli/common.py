"""What every command shares: the application, how an error is said, how a missing extra is named."""

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


def require(extra: str, *modules: str) -> None:
    """Exit with the command that installs what is missing of `modules`."""
    from importlib.util import find_spec

    if missing := [name for name in modules if find_spec(name) is None]:
        fail(f'this command needs {", ".join(missing)}. Install it with: pip install "hf-moe[{extra}]"')


def said(error: Exception, *models: str | None) -> str:
    """The error in words: of a file by its name, and of the Hub with those of `models` that are no folders here."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{str(error.filename)!r}: {error.strerror}. Check the path."
    elsewhere = [repr(name) for name in models if name is not None and not Path(name).exists()]
    if isinstance(error, OSError) and elsewhere:
        return f"no folder here is called {' or '.join(elsewhere)}, and the Hub gave nothing: {error}"
    return str(error)


def fail(message: str, *, code: int = 2) -> NoReturn:
    """Say what cannot be done in one line, and exit."""
    Console(stderr=True, soft_wrap=True).print(f"error: {' '.join(message.split())}", markup=False, highlight=False)
    sys.exit(code)
