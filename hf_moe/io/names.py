"""Names and command lines as reports show them: without the folders of the machine that wrote them."""

import sys
from collections.abc import Sequence
from pathlib import Path


def without_folders(name: str) -> str:
    """A model's or a file's name for a report: of a local path the last part, so that no folder shows."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def command_line(recipe: str, arguments: Sequence[str] | None) -> str:
    """How the recipe was called, through `hf-moe finetune` or as a file, without folders of this machine."""
    given = sys.argv[1:] if arguments is None else arguments
    program = ["python", f"recipes/{Path(recipe).name}"]
    if Path(sys.argv[0]).name in ("hf-moe", "__main__.py"):  # the command, and python -m hf_moe.cli
        program = ["hf-moe", "finetune", method_name(recipe)]
    return " ".join([*program, *map(without_folders, given)])


def method_name(recipe: str) -> str:
    """Name of a recipe's file for `hf-moe finetune`: finetune_expert_lora.py -> expert-lora, sft_trl.py -> sft."""
    return Path(recipe).stem.removeprefix("finetune_").removesuffix("_trl").replace("_", "-")
