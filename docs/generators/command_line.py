"""The page of the command line: every command's help, arguments and options, as typer knows them."""

import re
from typing import get_type_hints

import typer
from configuration import type_name
from typer.core import TyperGroup

from hf_moe.cli import app

_INTRO = """# Command line

`hf-moe COMMAND --help` prints the same. Errors are one line and exit with 2; a threshold that does not hold exits
with 1; Ctrl-C exits with 130. `python -m hf_moe.cli` is the same command.
"""


def page() -> str:
    group = typer.main.get_command(app)
    parts = [_INTRO, "| command | what it does |", "|---|---|"]
    commands = [entry for entry in _commands(group, "hf-moe") if not isinstance(entry[1], TyperGroup)]
    parts += [f"| [`{path}`](#{_anchor(path)}) | {_first_sentence(command)} |" for path, command in commands]
    parts += [_section(path, command) for path, command in commands]
    return "\n".join(parts)


def _commands(group, path: str):
    """Every command under a group with the words that call it, in the order of `--help`."""
    for name, command in group.commands.items():
        if not command.hidden:
            yield f"{path} {name}", command
            if isinstance(command, TyperGroup):
                yield from _commands(command, f"{path} {name}")


def _anchor(path: str) -> str:
    return path.replace(" ", "-")


def _text(text: str | None) -> str:
    """Help as Markdown: rich's markup has no place here, and a bar would end a table's cell."""
    text = re.sub(r"\[/?(?:bold|dim|italic|cyan|green|red|yellow)\]", "", text or "")
    return text.replace("\b\n", "").replace("|", "\\|").replace("<", "&lt;").strip()


def _first_sentence(command) -> str:
    return re.split(r"(?<=\.)\s", _text(command.help).replace("\n", " "))[0]


def _section(path: str, command) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    names = [p.name.upper() + ("..." if p.nargs == -1 else "") for p in arguments]
    names = [name if p.required else f"[{name}]" for name, p in zip(names, arguments, strict=True)]
    usage = " ".join([path, *names, "[OPTIONS]"])
    options = [p for p in command.params if p.param_type_name == "option" and not p.hidden]
    parts = [f"\n## {path} {{ #{_anchor(path)} }}\n", _text(command.help), f"\n```text\n{usage}\n```\n"]
    if arguments:
        parts += ["| argument | meaning |", "|---|---|"]
        parts += [f"| `{p.name.upper()}` | {_text(getattr(p, 'help', ''))} |" for p in arguments] + [""]
    if options:
        parts += ["| option | value | default | meaning |", "|---|---|---|---|"]
        hints = get_type_hints(command.callback)
        parts += [_option_row(option, hints[option.name]) for option in options] + [""]
    return "\n".join(parts)


def _option_row(option, hint) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    value = "" if option.is_flag else re.sub(r"list\[(\w+)\]", r"\1, repeatable", type_name(hint))
    shown = "" if option.default in (None, False, "") else f"`{option.default}`"
    shown = option.show_default if isinstance(option.show_default, str) else shown
    return f"| {names} | {value} | {'required' if option.required else shown} | {_text(option.help)} |"
