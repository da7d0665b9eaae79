"""hf-moe finetune: the fine-tuning recipes"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from hf_moe.cli.common import app, fail, require
from hf_moe.cli.words import without_type
from hf_moe.finetuning.command_line.help import LONG, answer_help
from hf_moe.finetuning.command_line.methods import METHODS, Method


class _Recipe(TyperCommand):
    """A command whose arguments, `--help` among them, are the recipe's to read."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return ctx.args


class _Methods(TyperGroup):
    def get_help_option(self, ctx: Any) -> Any:
        return without_type(super().get_help_option(ctx))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0].endswith((".yaml", ".yml")):
            fail(f"name the method before the config: hf-moe finetune METHOD {args[0]}. METHOD: {', '.join(METHODS)}.")
        return super().resolve_command(ctx, args)


methods = typer.Typer(
    name="finetune",
    cls=_Methods,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune a Mixture-of-Experts. `hf-moe finetune METHOD --help` lists a method's options.",
    epilog="On several GPUs: torchrun --nproc_per_node 8 -m hf_moe.cli finetune METHOD CONFIG",
)
app.add_typer(methods, rich_help_panel="Fine-tune")


def _add(name: str, method: Method) -> None:
    @methods.command(name, cls=_Recipe, help=method.summary)
    def run(ctx: typer.Context) -> None:
        if not any(each in LONG for each in ctx.args):
            answer_help(ctx.args, str(_file(method)))
        require("trl" if "trl" in method.needs else "recipes", *method.needs)
        from hf_moe.finetuning.surroundings import recipe_errors

        with recipe_errors():
            import_module(f"hf_moe.recipes.{method.recipe}").main(ctx.args)


def _file(method: Method) -> Path:
    """The recipe's file, which is not run."""
    spec = find_spec(f"hf_moe.recipes.{method.recipe}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


for _name, _method in METHODS.items():
    _add(_name, _method)
