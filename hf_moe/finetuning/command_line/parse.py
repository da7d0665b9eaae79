"""A recipe's choices read: from a YAML file, each of whose keys is also an option of the command line, which wins."""

import re
import sys
from argparse import Action, ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from transformers import HfArgumentParser

from hf_moe.finetuning.arguments import RecipeError
from hf_moe.finetuning.command_line.help import answer_help
from hf_moe.finetuning.command_line.names import meant, refusal
from hf_moe.finetuning.command_line.values import fits, make_strict, rule
from hf_moe.finetuning.command_line.yaml_config import beside_config, read_yaml


def parse_recipe(
    kinds: Sequence[type], arguments: Sequence[str] | None = None, recipe: str | None = None
) -> list[Any]:
    """One instance of each dataclass, from `[CONFIG] [--option value ...]`; `--config FILE` is CONFIG as well.

    Options may be written with dashes or underscores. `--help` and `--help-all` end the program.

    Args:
        recipe: The recipe's file. Of the configs beside it CONFIG needs no more than the name, wherever they are
            installed; a file of that name in the working directory comes first.

    Raises:
        RecipeError: For a file that cannot be read, an option or key that is unknown or comes twice, or a value of the
            wrong type.
        SystemExit: After the help.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    answer_help(given, recipe, kinds)
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    parser = _Parser(kinds, hints)
    positional = list(takewhile(lambda each: not each.startswith("-"), given))
    options = given[len(positional) :]
    named = parser.named(options)
    if (config := _config(positional, options, recipe)) is not None:
        _set_defaults(parser, beside_config(read_yaml(config), config), config)
    if "model" in parser.actions and parser.actions["model"].required and "model" not in named:
        raise RecipeError("no model: give a folder or a name on the Hub (--model, or model in the config).")
    try:
        chosen = vars(parser.read(options))
        return [kind(**{each.name: chosen[each.name] for each in fields(kind) if each.init}) for kind in kinds]
    except (TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(str(error)) from error


class _Parser(HfArgumentParser):
    """The options of some dataclasses; whatever is wrong with them is a RecipeError that says what would be right."""

    def __init__(self, kinds: Sequence[type], hints: Mapping[str, Any]):
        super().__init__(list(kinds), allow_abbrev=False, add_help=False)
        self.actions: dict[str, Action] = {}
        self.hints = hints
        for action in self._actions:
            make_strict(action, hints[action.dest])
            self.actions.setdefault(action.dest, action)  # the first: --no_packing comes after --packing
        self.add_argument("--config")

    def named(self, options: Sequence[str]) -> set[str]:
        """The names of all options that are given.

        Raises:
            RecipeError: If one is unknown, or comes twice.
        """
        names: set[str] = set()
        for text in options:
            if not text.startswith("-") or re.match(r"-\.?\d", text):
                continue
            option = text.partition("=")[0]
            action = self._option_string_actions.get(option)
            if action is None:
                raise RecipeError(self.unknown(option))
            if action.dest in names:
                raise RecipeError(f"--{action.dest} is given twice. Give it once.")
            names.add(action.dest)
        return names

    def unknown(self, option: str) -> str:
        """The sentence for an option that does not exist."""
        near = meant(option, [*self.actions, "config"])
        hint = f"Did you mean '--{near}'?" if near else "--help lists the options."
        return refusal(option) or f"unknown option {option!r}. {hint}"

    def read(self, options: Sequence[str]) -> Any:
        """The namespace of argparse.

        Raises:
            RecipeError: For a value that is missing, surplus, or of the wrong type.
        """
        for action in self._actions:
            action.required = False
        namespace, surplus = self.parse_known_args(options)
        if surplus:
            raise RecipeError(f"{surplus[0]!r} belongs to no option. CONFIG comes first, values after their option.")
        return namespace

    def error(self, message: str) -> NoReturn:
        found = re.match(r"argument (--\w+)\S*: (.*)", message, re.DOTALL)
        if found is None:
            raise RecipeError(message)
        option, what = found.groups()
        if what.startswith("ignored explicit argument"):
            what = f"takes no value. Leave it out, or write --{option.removeprefix('--no_')} false."
        if what.startswith("expected"):
            what = f"needs a value: {rule(self.hints[option[2:]]) if option[2:] in self.hints else 'a YAML file'}."
        raise RecipeError(f"{option} {what}")


def _config(positional: Sequence[str], options: Sequence[str], recipe: str | None) -> Path | None:
    """The config's path.

    Raises:
        RecipeError: If more than one is given.
    """
    first = HfArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", nargs="?")
    configs = [*positional, *filter(None, [first.parse_known_args(options)[0].config])]
    if len(configs) > 1:
        raise RecipeError(f"one config at most, got {' and '.join(map(repr, configs))}. Texts are given with --data.")
    if not configs:
        return None
    config = Path(configs[0])
    if recipe is not None and not config.is_absolute() and not config.exists():
        shipped = Path(recipe).with_name("configs") / config
        return shipped if shipped.exists() else config
    return config


def _set_defaults(parser: _Parser, given: Mapping[str, Any], config: Path) -> None:
    """Take what the config says for the options' defaults.

    Raises:
        RecipeError: For a key that is unknown, or a value of the wrong type.
    """
    for key, value in given.items():
        if key not in parser.actions:
            near = meant(str(key), parser.actions)
            hint = f"Did you mean {near!r}?" if near else "--help lists the keys."
            raise RecipeError(f"{config}: {refusal(str(key)) or f'unknown key {key!r}. {hint}'}")
        action = parser.actions[key]
        if not fits(value, parser.hints[key]):
            wanted = rule(parser.hints[key])
            quote = isinstance(value, bool) and ("text" in wanted or wanted.startswith("one of"))
            hint = " YAML reads yes, no, on and off so: put it in quotes." if quote else ""
            raise RecipeError(f"{config}: {key} must be {wanted}, got {value!r:.80}.{hint}")
        if key != "data" and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # argparse gives strings their type: YAML reads 1e-4 as a string too
        if isinstance(value, str):
            value = _read_text(action, value, f"{config}: {key}")
        parser.set_defaults(**{key: value})
        action.required = False


def _read_text(action: Action, text: str, where: str) -> Any:
    try:
        return action.type(text)  # type: ignore[operator, misc]
    except ArgumentTypeError as error:
        raise RecipeError(f"{where} {error}") from error
