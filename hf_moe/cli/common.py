"""Shared by the commands: the application, common options, errors in one line, the name of a missing extra."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from hf_moe.io.console import print_to_stderr
from hf_moe.io.installation import install_command

READER_GONE = 141
"""Exit code where the reader of the output ended first, as in `| head -1`: that of a program that SIGPIPE ends."""


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """End with one line and a fixed exit code where no command has foreseen the error."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        sys.exit(READER_GONE)
    except SystemExit as ended:  # rich ends the program with 1
        if isinstance(ended.__context__, BrokenPipeError):
            sys.exit(READER_GONE)
        raise
    except KeyboardInterrupt:
        fail("interrupted.", code=130)
    except OSError as error:
        fail(describe_error(error))
    except MemoryError:
        fail("the memory is not enough for this.")
    except RecursionError:
        fail("a file is nested too deeply to be read.")


class _Commands(TyperGroup):
    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _errors_in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _errors_in_one_line():
            return super().invoke(ctx)


def _discard_output() -> None:
    """Send what is left to nowhere: Python would try to write it as it ends, and complain."""
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
    str, typer.Option(help="For records that cannot be used: error, or skip to leave them out with a note.")
]
ChatTemplate = Annotated[
    Path | None, typer.Option(help="A Jinja file for conversations, in place of the tokenizer's template.")
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
    """Exit with the command that installs the extra, if one of `modules` is missing."""
    from importlib.util import find_spec

    if missing := [name for name in modules if find_spec(name) is None]:
        fail(f"this command needs {', '.join(missing)}. Install it with: {install_command(extra)}")


def describe_error(error: Exception, *models: str | None) -> str:
    """Describe an error in one line: with the file's name, or with those of `models` that are no folders here.

    Raises:
        BrokenPipeError: If it is one: that is no failure, and nobody reads the text.
    """
    if isinstance(error, BrokenPipeError):
        raise error
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{str(error.filename)!r:.200}: {error.strerror}. Check the path."
    elsewhere = [name for name in models if name is not None and not os.path.exists(name)]
    # an error that is a ValueError as well is ours, and names the model
    if not isinstance(error, OSError) or isinstance(error, ValueError) or not elsewhere:
        return str(error)
    return _absent(error, elsewhere)


def _absent(error: OSError, names: list[str]) -> str:
    from hf_moe.loading.errors import HUB_ERRORS, hub_sentence

    if len(names) == 1 and isinstance(error, HUB_ERRORS):
        return hub_sentence(error, names[0])
    return f"no folder here is called {' or '.join(map(repr, names))}, and the Hub gave nothing: {error}"


def tokenizer_of(path: str, chat_template: Path | None = None) -> Callable[[], Any]:
    """Return a function that loads a model's tokenizer on its first call."""

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
    """Print `message` in one line on the standard error, and exit."""
    print_to_stderr(f"error: {' '.join(message.split())}")
    sys.exit(code)
