"""Names and command lines as reports show them: without the folders of the machine that wrote them."""

import sys
from collections.abc import Sequence
from pathlib import Path


def without_folders(name: str) -> str:
    """A model's or a file's name for a report: of a local path the last part, so that no folder shows."""
    return Path(name).name if Path(name).exists() or Path(name).is_absolute() else name


def command_line(recipe: str, arguments: Sequence[str] | None) -> str:
    """How the recipe was called, without folders of this machine."""
    given = sys.argv[1:] if arguments is None else arguments
    return " ".join(["python", f"recipes/{Path(recipe).name}", *map(without_folders, given)])
