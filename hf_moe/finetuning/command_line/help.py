"""The help of a recipe: the options that people set, in groups; with `--help-all` every field of the dataclasses."""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, get_args, get_type_hints

from hf_moe.finetuning.command_line.methods import METHODS, Method, groups_of, method_of
from hf_moe.finetuning.command_line.source import REQUIRED, Option

SHORT = ("-h", "--help")
LONG = ("--help-all", "--help_all")
_INDENT = 31
_KEPT = "\u00a0"
_NAMED = {"model": "NAME", "output_dir": "FOLDER", "chat_template": "FILE", "data": "PATH [PATH ...]"}
_VALUES = {"bool": "", "int": "N", "float": "X", "list": "A [B ...]", "dict": "JSON", "str": "TEXT"}


def answer_help(arguments: Sequence[str], recipe: str | None, kinds: Sequence[type] = ()) -> None:
    """Print the help and end the program, if the command line asks for it.

    Args:
        recipe: The recipe's file; of one that is none of ours every option is printed.
        kinds: Its dataclasses, for `--help-all`.

    Raises:
        SystemExit: After the help.
    """
    wants_all = any(each in LONG for each in arguments)
    if not wants_all and not any(each in SHORT for each in arguments):
        return
    name = method_of(recipe)
    if name is None or recipe is None:
        print(_sections({"Options": list(map(_from_field, _fields(kinds)))}))
    elif wants_all:
        print(f"{short_help(name, Path(recipe))}\n{_rest(METHODS[name], Path(recipe), kinds)}")
    else:
        print(f"{short_help(name, Path(recipe))}\n{_epilogue(METHODS[name])}")
    raise SystemExit(0)


def short_help(name: str, recipe: Path) -> str:
    """Usage, what the method does, and its options in groups."""
    called = Path(sys.argv[0]).name
    program = f"python recipes/{called}" if called == recipe.name else f"hf-moe finetune {name}"
    about = (
        f"{METHODS[name].summary} CONFIG is a YAML file, or the name of a shipped one; its keys are the options "
        "below, and an option given here wins."
    )
    usage = f"Usage: {program} [CONFIG] [--option value ...]"
    return f"{usage}\n\n{_filled(about)}\n\n{_sections(groups_of(METHODS[name], recipe))}"


def _epilogue(method: Method) -> str:
    library = "transformers" if method.base == "TrainingArguments" else "TRL"
    return _filled(
        f"Every field of {method.base} ({library}) is an option as well: --help-all lists all of them. Options may be "
        "written with dashes (--output-dir). What is true by default is switched off by --no_NAME, or in CONFIG by "
        "NAME: false."
    )


def _rest(method: Method, recipe: Path, kinds: Sequence[type]) -> str:
    """Every option that the short help leaves out."""
    shown = {option.name for options in groups_of(method, recipe).values() for option in options}
    rest = [_from_field(each) for each in _fields(kinds) if each[1].name not in shown]
    return _sections({f"Every other field of {method.base}": rest})


def _fields(kinds: Sequence[type]) -> list[tuple[type, Any]]:
    return [(kind, each) for kind in kinds for each in dataclasses.fields(kind) if each.init]


def _from_field(found: tuple[type, Any]) -> Option:
    """An option from a dataclass's field, whose help may stand at the base that it overrides."""
    kind, own = found
    fields = [base.__dict__.get("__dataclass_fields__", {}).get(own.name) for base in kind.__mro__]
    texts = (each.metadata.get("help") for each in fields if each is not None)
    default = own.default
    if default is dataclasses.MISSING:
        default = REQUIRED if own.default_factory is dataclasses.MISSING else None
    return Option(own.name, _plain(get_type_hints(kind)[own.name]), default, next(filter(None, texts), ""))


def _plain(hint: Any) -> str:
    names = [getattr(each, "__name__", str(each)) for each in (get_args(hint) or [hint])]
    return " | ".join(names)


def _sections(groups: dict[str, list[Option]]) -> str:
    return "\n".join(f"{title}\n" + "".join(map(_line, options)) for title, options in groups.items())


def _line(option: Option) -> str:
    left = f"  --{option.name} {_value(option)}".rstrip()
    indent = " " * _INDENT
    text = _filled(_explained(option), indent)
    if len(left) < _INDENT - 1:
        return left.ljust(_INDENT) + text[_INDENT:] + "\n"
    return f"{left}\n{text}\n" if text.strip() else f"{left}\n"


def _value(option: Option) -> str:
    if option.name in _NAMED:
        return _NAMED[option.name]
    kinds = option.kind.replace("list[str]", "list").replace("dict[str, Any]", "dict").split(" | ")
    return next((_VALUES[kind] for kind in kinds if kind in _VALUES), "TEXT")


def _explained(option: Option) -> str:
    """The help text with `[required]` or the default."""
    text = " ".join(option.help.split()).replace("%%", "%")
    if option.default is REQUIRED:
        return f"{text} [required]"
    default = getattr(option.default, "value", option.default)
    if default in (None, False, ""):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    return f"{text} [default:{_KEPT}{shown.lower() if isinstance(default, bool) else shown}]".strip()


def _filled(text: str, indent: str = "") -> str:
    """Text in lines of the terminal's width; what `_KEPT` joins is not broken."""
    lines = fill(text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return lines.replace(_KEPT, " ")


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)
