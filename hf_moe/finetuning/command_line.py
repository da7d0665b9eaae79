"""A recipe's choices read: from a YAML file, each of whose keys is also an option of the command line, which wins."""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from hf_moe.finetuning.arguments import RecipeError
from hf_moe.finetuning.yaml_config import beside_config, read_yaml

RENAMED = {"datasets": "data"}


def parse_recipe(
    kinds: Sequence[type], arguments: Sequence[str] | None = None, recipe: str | None = None
) -> list[Any]:
    """One instance of each dataclass, from `--config FILE` and options of the command line.

    Args:
        recipe: The recipe's file. Of the configs beside it `--config` needs no more than the name, wherever they are
            installed; a file of that name in the working directory comes first.

    Raises:
        RecipeError: For a file that cannot be read, an unknown or repeated key, or a value of the wrong type.
        SystemExit: For a wrong command line, as argparse does.
    """
    parser = HfArgumentParser(list(kinds), allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="A YAML file; options of the command line win over it.")
    given_options = sys.argv[1:] if arguments is None else arguments
    refuse_old_names(each[2:].partition("=")[0] for each in given_options if each.startswith("--"))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    config = first.parse_known_args(arguments)[0].config
    if config is not None:
        if recipe is not None and not config.is_absolute() and not config.exists():
            shipped = Path(recipe).with_name("configs") / config
            config = shipped if shipped.exists() else config
        given = beside_config(read_yaml(config), config)
        _set_defaults(parser, given, config)
        _refuse_wrong_types(kinds, given, config)
    try:
        return list(parser.parse_args_into_dataclasses(arguments))[: len(kinds)]
    except (TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(str(error)) from error


def refuse_old_names(names: Iterable[str]) -> None:
    """Raises RecipeError for a choice that has another name now."""
    for name in names:
        if name in RENAMED:
            raise RecipeError(f"{name} is called {RENAMED[name]} now.")


def _set_defaults(parser: HfArgumentParser, given: dict[str, Any], config: Path) -> None:
    refuse_old_names(given)
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for key, value in given.items():
        if key not in actions:
            near = get_close_matches(str(key), actions, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " --help lists the keys."
            raise RecipeError(f"{config}: unknown key {key!r}.{hint}")
        if key != "data" and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # argparse gives strings their type: YAML reads 1e-4 as a string too
        parser.set_defaults(**{key: value})
        actions[key].required = False


def _refuse_wrong_types(kinds: Sequence[type], given: Mapping[str, Any], config: Path) -> None:
    """argparse reads text alone, and takes whatever else YAML made of a value as it is."""
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for key, value in given.items():
        kind = hints[key]
        wanted = {get_origin(each) or each for each in (get_args(kind) if _is_union(kind) else [kind])}
        if not _fits(value, wanted):
            names = ", ".join(sorted("null" if each is NoneType else each.__name__ for each in wanted))
            quote = isinstance(value, bool) and str in wanted
            hint = " YAML reads yes, no, on and off so: put it in quotes." if quote else ""
            finite = "finite " if isinstance(value, float) else ""
            raise RecipeError(f"{config}: {key} must be {finite}{names}, got {value!r:.80}.{hint}")


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _fits(value: Any, wanted: set[Any]) -> bool:
    if value is None or isinstance(value, bool | list | dict):
        return type(value) in wanted
    if isinstance(value, float):
        return math.isfinite(value) and bool(wanted & {float, str})
    if isinstance(value, int):
        return bool(wanted & {int, float, str}) and abs(value) < 2**63
    return wanted - {NoneType} != {list}  # text is read by argparse, which makes no list of it
