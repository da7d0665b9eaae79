"""The words of the command line: other names of an option are errors that say ours, and help is written one way."""

import re
from typing import Any

from typer.core import TyperCommand

OTHER_NAMES = {
    "--adapter-path": "--adapter",
    "--backend": "--experts-implementation",
    "--batch": "--batch-size",
    "--chat": "--apply-chat-template",
    "--dataset": "--data",
    "--datasets": "--data",
    "--domains": "--data",
    "--fewshot": "--num-fewshot",
    "--file": "--data",
    "--least-per-expert": "--min-per-expert",
    "--lora": "--adapter",
    "--max-bytes": "--max-tokens",
    "--model": "MODEL",
    "--model-name": "MODEL",
    "--out": "--output",
    "--output-dir": "--output",
    "--peft": "--adapter",
    "--text": "--data",
    "--texts": "--data",
    "--thresholds": "--gate",
    "--tokens": "--max-tokens",
    "--torch-dtype": "--dtype",
}
"""Names that an option had, or that other tools give it, and what it is called here."""


class Command(TyperCommand):
    """A command that names our option where another name is given, and whose help has no Python types in it."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        for parameter in self.params:
            _name_value(parameter)
        # typer would break the lines of later paragraphs where the source does
        self.help = self.help and re.sub(r"(?<!\n)\n(?!\n)", " ", self.help)

    def get_help_option(self, ctx: Any) -> Any:
        return without_type(super().get_help_option(ctx))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        # a newer typer writes {MODEL}
        return [piece.translate({ord("{"): None, ord("}"): None}) for piece in super().collect_usage_pieces(ctx)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for given in args:
            if given == "--":
                break
            if message := self._renamed(given.partition("=")[0], ctx):
                ctx.fail(message)
        return super().parse_args(ctx, args)

    def _renamed(self, given: str, ctx: Any) -> str | None:
        """What to say about an option that this command has under another name."""
        known = {name for parameter in self.get_params(ctx) for name in (*parameter.opts, parameter.metavar) if name}
        # of scripts that write options as Python does
        spelt = given.replace("_", "-")
        if not given.startswith("--") or given in known:
            return None
        if self.name == "evaluate" and given == "--compare":
            return "--compare is a command of its own now: hf-moe compare-results A.json B.json."
        name = spelt if spelt in known else OTHER_NAMES.get(spelt)
        if name not in known:
            return None
        if name == "MODEL":
            return f"{given} is the first argument here: hf-moe {self.name} MODEL."
        return f"{given} is called {name} here."


def without_type(flag: Any) -> Any:
    """A flag, or None, that is shown without the type of its value."""
    if flag is not None:
        flag.metavar = ""
    return flag


def _name_value(parameter: Any) -> None:
    """Arguments in capitals, flags without a type."""
    if parameter.metavar is not None:
        return
    if parameter.param_type_name == "argument":
        parameter.metavar = parameter.name.upper()
    elif parameter.is_flag:
        without_type(parameter)
