"""Code that a saved folder carries, compared with the code that runs here.

`save_pretrained` copies these files beside the weights, so that the folder loads where hf_moe is not installed
(`trust_remote_code=True`). They stay as they were when hf_moe changes. With hf_moe imported its own classes load every
folder, whatever the folder carries.
"""

from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

MODELING_FILE = "modeling_hf_moe.py"


def shipped_files() -> dict[str, Path]:
    """Each file that `save_pretrained` copies, by its name."""
    modeling = Path(__file__).with_name(MODELING_FILE)
    return {path.name: path for path in (modeling, *map(Path, get_relative_import_files(modeling)))}


def other_files(folder: Path) -> list[str]:
    """Names of the code files in `folder` whose text is not the one that runs here; empty if it carries no code."""
    if not (folder / MODELING_FILE).is_file():
        return []
    held = {name: path for name, path in shipped_files().items() if (folder / name).is_file()}
    return sorted(name for name, path in held.items() if not _is_same(folder / name, path))


def code_note(folder: Path) -> str | None:
    """A note on a folder that carries the code of another hf_moe, with the way out; None if it does not."""
    others = other_files(folder)
    if not others:
        return None
    return (
        f"{folder} carries code of another version of hf_moe ({', '.join(others)}). It runs where hf_moe is not "
        "imported (trust_remote_code=True), and may be wrong on a newer transformers; this hf_moe loads the folder "
        "with its own. Renew it: from hf_moe.hub.renew_code import renew_code; renew_code(folder). save_pretrained "
        "and hf-moe push write the new code as well."
    )


def _is_same(held: Path, own: Path) -> bool:
    text = own.read_text(encoding="utf-8")
    # far larger: not read. Line endings may have been changed on the way
    return held.stat().st_size <= 2 * len(text.encode()) and held.read_text("utf-8", errors="replace") == text
