"""What every command shares: the application, how an error is said, how a missing extra is named."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from typer.core import TyperGroup

READER_GONE = 141
"""Exit code where the reader of the output ended first, as in `| head -1`: that of a program that SIGPIPE ends."""


@contextmanager
def _plain_ends() -> Iterator[None]:
    """What no command foresees of its surroundings ends in a sentence, and in no exit code of another meaning."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _write_no_more()
        sys.exit(READER_GONE)
    except SystemExit as ended:  # rich ends the program with 1
        if isinstance(ended.__context__, BrokenPipeError):
            sys.exit(READER_GONE)
        raise
    except KeyboardInterrupt:
        fail("interrupted.", code=130)
    except OSError as error:
        fail(said(error))
    except MemoryError:
        fail("the memory is not enough for this.")
    except RecursionError:
        fail("a file is nested too deeply to be read.")


class _Commands(TyperGroup):
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _plain_ends():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _plain_ends():
            return super().invoke(ctx)


def _write_no_more() -> None:
    """Python would try again at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


app = typer.Typer(
    name="hf-moe",
    cls=_Commands,
    help="Mixture-of-Experts for the Hugging Face stack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

OnBadRow = Annotated[
    str, typer.Option(help="Of records that cannot be used: error, or skip to leave them out and say so.")
]
ChatTemplate = Annotated[
    Path | None, typer.Option(help="A Jinja file for conversations, if the tokenizer's will not do.")
]


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
    """The error in words: of a file by its name, and of the Hub with those of `models` that are no folders here.

    Raises:
        BrokenPipeError: If it is one: no failure, and no text that anybody reads.
    """
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{str(error.filename)!r:.200}: {error.strerror}. Check the path."
    elsewhere = [repr(name) for name in models if name is not None and not os.path.exists(name)]
    # an error that is a ValueError as well is ours, and names the model
    if isinstance(error, OSError) and not isinstance(error, ValueError) and elsewhere:
        return f"no folder here is called {' or '.join(elsewhere)}, and the Hub gave nothing: {error}"
    return str(error)


def tokenizer_of(path: str, chat_template: Path | None = None) -> Callable[[], Any]:
    """Loads a model's tokenizer when it is first asked for."""

    @cache
    def load() -> Any:
        from hf_moe.data.chat_text import read_chat_template
        from hf_moe.loading.pretrained import load_tokenizer

        tokenizer: Any = load_tokenizer(path)
        if chat_template is not None:
            tokenizer.chat_template = read_chat_template(chat_template)
        return tokenizer

    return load


def fail(message: str, *, code: int = 2) -> NoReturn:
    """Say what cannot be done in one line, and exit."""
    Console(stderr=True, soft_wrap=True).print(f"error: {' '.join(message.split())}", markup=False, highlight=False)
    sys.exit(code)
