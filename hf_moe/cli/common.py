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

from hf_moe.cli.words import Command, without_type
from hf_moe.io.console import print_to_stderr
from hf_moe.io.installation import install_command
from hf_moe.io.quiet import quiet_libraries

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
    def get_help_option(self, ctx: Any) -> Any:
        return without_type(super().get_help_option(ctx))

    def list_commands(self, ctx: Any) -> list[str]:
        """Groups where they belong; typer lists them last."""
        names = super().list_commands(ctx)
        names.remove("finetune")
        return [*names[: names.index("generate")], "finetune", *names[names.index("generate") :]]

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _errors_in_one_line():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _errors_in_one_line(), quiet_libraries():
            return super().invoke(ctx)


def _discard_output() -> None:
    """Send what is left to nowhere: Python would try to write it as it ends, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Application(typer.Typer):
    """Typer whose commands are `Command`s."""

    def command(self, name: str | None = None, *, cls: Any = Command, **options: Any) -> Any:
        return super().command(name, cls=cls, **options)


app = _Application(
    name="hf-moe",
    cls=_Commands,
    help="Mixture-of-Experts for the Hugging Face stack: fine-tune a model, see its routing, evaluate it, publish it.",
    epilog="Without a model at hand begin with `hf-moe quickstart`; with one, `hf-moe info MODEL` says what fits.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="A model folder, or a name on the Hub.")]
Adapter = Annotated[str | None, typer.Option(help="A PEFT adapter on it: a folder, or a name on the Hub.")]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="Text or conversations, as the recipes read them: a file (.jsonl, .json, .csv, .parquet, .txt, .md), a "
        "folder of files, a name on the Hub, or 'embedded', the text that Python carries. Repeatable.",
        metavar="TEXT",
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Tokens of each domain, drawn from all over it.")]
OnBadRow = Annotated[
    str,
    typer.Option(
        help="For records, and files of a folder, that cannot be used: error, or skip to leave them out with a note."
    ),
]
ChatTemplate = Annotated[
    Path | None, typer.Option(help="A Jinja file for conversations, in place of the tokenizer's template.")
]
BACKENDS_HELP = "Experts backend; if left out hf_moe, where it runs the model."
Backend = Annotated[str | None, typer.Option(help=BACKENDS_HELP)]
DTYPES_HELP = "auto (as saved), float32, bfloat16, float16."
Dtype = Annotated[str, typer.Option(help=DTYPES_HELP)]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU if there is one.")]
Gate = Annotated[Path | None, typer.Option(help="A YAML file of thresholds: exit code 1 if one does not hold.")]


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
        bool, typer.Option("--version", metavar="", callback=_show_version, is_eager=True, help="Print the version.")
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


def tokenizer_of(path: str, chat_template: Path | None = None, adapter: str | None = None) -> Callable[[], Any]:
    """Return a function that loads a model's tokenizer on its first call.

    Args:
        chat_template: A file that is used in place of the tokenizer's template.
        adapter: Where that is None, the folder of an adapter, whose template is used if it has one.
    """

    @cache
    def load() -> Any:
        from hf_moe.data.chat_text import CHAT_TEMPLATE, read_chat_template
        from hf_moe.loading.pretrained import load_tokenizer

        tokenizer: Any = load_tokenizer(path)
        learned = None if adapter is None else Path(adapter, CHAT_TEMPLATE)
        template = learned if chat_template is None and learned is not None and learned.is_file() else chat_template
        if template is not None:
            tokenizer.chat_template = read_chat_template(template)
        return tokenizer

    return load


def model_and_adapter(model: str, adapter: str | None = None) -> tuple[str, str | None]:
    """The model and adapter to load; of an adapter in the model's place, the base that it names, and itself.

    Exits with the option that is meant where the base cannot be told.
    """
    from hf_moe.loading.adapter_base import AdapterBaseError, base_of_adapter, is_adapter

    if not is_adapter(model):
        return model, adapter
    if adapter is not None:
        fail(f"{model!r} is a PEFT adapter, and --adapter names another. Name the model that it goes on.")
    try:
        base = base_of_adapter(model)
    except AdapterBaseError as error:
        fail(str(error))
    print_to_stderr(f"{model} is a PEFT adapter: it is loaded onto {base}, as by {base} --adapter {model}")
    return base, model


def check_max_tokens(max_tokens: int) -> None:
    if max_tokens < 1:
        fail(f"--max-tokens must be at least 1, got {max_tokens}.")


def fail(message: str, *, code: int = 2) -> NoReturn:
    """Print `message` in one line on the standard error, and exit."""
    print_to_stderr(f"error: {' '.join(message.split())}")
    sys.exit(code)
