"""Options read from the source text of a recipe's dataclasses: importing those takes seconds, and TRL."""

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

REQUIRED = object()
"""The default of an option that has none."""


@dataclass(frozen=True)
class Option:
    """One option of a recipe, as help shows it.

    Attributes:
        kind: Its type as the source has it, such as `int | None`.
        default: `REQUIRED` if it must be given; None if the recipe finds it.
    """

    name: str
    kind: str
    default: Any
    help: str


def options_of(dataclass_name: str, files: Sequence[Path]) -> dict[str, Option]:
    """The fields of a dataclass of these files, with those of its bases that the files define as well.

    Every default and help text there is a literal, or the name of one in these files.

    Raises:
        KeyError: If no file defines the dataclass.
    """
    statements = [statement for file in files for statement in _statements(file)]
    classes = {each.name: each for each in statements if isinstance(each, ast.ClassDef)}
    constants = {
        ast.unparse(each.targets[0]): each.value.value
        for each in statements
        if isinstance(each, ast.Assign) and isinstance(each.value, ast.Constant)
    }
    return _collect(classes[dataclass_name], classes, constants)


def _collect(node: ast.ClassDef, classes: dict[str, ast.ClassDef], constants: dict[str, Any]) -> dict[str, Option]:
    found: dict[str, Option] = {}
    for base in reversed(node.bases):  # as dataclasses do: the first base comes last, and wins
        if isinstance(base, ast.Name) and base.id in classes:
            found |= _collect(classes[base.id], classes, constants)
    for option in _own(node, constants):
        found[option.name] = option if option.help or option.name not in found else _with_help(option, found)
    return found


def _with_help(option: Option, found: dict[str, Option]) -> Option:
    return Option(option.name, option.kind, option.default, found[option.name].help)


@cache
def _statements(file: Path) -> list[ast.stmt]:
    return ast.parse(file.read_text(encoding="utf-8")).body


def _own(node: ast.ClassDef, constants: dict[str, Any]) -> Iterator[Option]:
    for each in node.body:
        if not (isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)):
            continue
        given = {}
        if isinstance(each.value, ast.Call):
            given = {keyword.arg: keyword.value for keyword in each.value.keywords}
        default = REQUIRED
        if "default" in given:
            default = _literal(given["default"], constants)
        elif "default_factory" in given:
            default = None
        yield Option(each.target.id, ast.unparse(each.annotation), default, _help(given.get("metadata"), constants))


def _help(metadata: ast.expr | None, constants: dict[str, Any]) -> str:
    if not isinstance(metadata, ast.Dict):
        return ""
    texts = {ast.literal_eval(key): value for key, value in zip(metadata.keys, metadata.values, strict=True) if key}
    found = texts.get("help")
    return "" if found is None else str(_literal(found, constants))


def _literal(node: ast.expr, constants: dict[str, Any]) -> Any:
    return constants[node.id] if isinstance(node, ast.Name) else ast.literal_eval(node)
