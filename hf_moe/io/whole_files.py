"""Files and folders that appear whole or not at all, whatever interrupts the writing."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# names that nobody else gives: what bears them may be deleted
_NEW, _OLD = ".hf_moe.tmp", ".hf_moe.old.tmp"
_OF_SAFETENSORS = re.compile(r"\.tmp[A-Za-z0-9]{6}")


def write_text(path: Path, text: str) -> None:
    """Write a file so that `path` holds either the old or the new text, never half of it.

    What a symbolic link at `path` points to stays as it is: the link is replaced.
    """
    unfinished = temporary(path)
    if unfinished.is_symlink():  # put there by somebody else: it would be followed
        unfinished.unlink()
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON; NaN and infinity are refused with ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, whole, when the block ends without an error."""
    unfinished = temporary(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        flush(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    move_into_place(unfinished, path)


def move_into_place(folder: Path, target: Path) -> None:
    """Rename a flushed folder to `target`, in place of the folder that is there, and make the rename durable."""
    old = target.with_name(f".{target.name}{_OLD}")
    if target.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(target, old)  # deleted last: an error there must not cost the new one
    os.replace(folder, target)
    _flush_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(folder: Path) -> None:
    """Make the files in a folder, and their names, durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _flush_folder(path)
    _flush_folder(folder)


def temporary(path: Path) -> Path:
    """Where `path` is written before it moves into its place."""
    return path.with_name(f".{path.name}{_NEW}")


def is_temporary(name: str) -> bool:
    """True if a file of this name in a checkpoint was never finished: by the functions here, or by safetensors."""
    return name.endswith((_NEW, _OLD)) or _OF_SAFETENSORS.fullmatch(name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers of this module left; what they had moved out of the way goes back to its place.

    Names that others give, and links, stay.
    """
    for path in folder.glob(".*"):
        if path.is_symlink() or not path.name.endswith((_NEW, _OLD)):
            continue
        if path.name.endswith(_OLD) and not (target := path.with_name(path.name[1 : -len(_OLD)])).exists():
            os.replace(path, target)
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _flush_folder(folder: Path) -> None:
    """Make names in a folder, and renames, durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
