"""Checkpoints and results that an interruption cannot corrupt.

The Trainer writes a checkpoint file by file into its final folder and resumes from the highest number unchecked. Here
a checkpoint counts only once a manifest of its files' sizes and hashes, written last, says that it is complete.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

MANIFEST = "manifest.json"


def write_text(path: Path, text: str) -> None:
    """Write a file so that `path` holds either the old or the new text, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _flush_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of JSON; NaN and infinity are refused with ValueError."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, whole, when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for file in temporary.rglob("*"):
        if file.is_file():
            _flush(file)
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)
    _flush_folder(path.parent)


def seal(folder: Path) -> None:
    """Flush every file to disk, then write the manifest that marks the checkpoint as complete."""
    manifest = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST and not path.name.startswith((".tmp", f".{MANIFEST}")):
            _flush(path)
            manifest[path.relative_to(folder).as_posix()] = [path.stat().st_size, _sha256(path)]
    write_json(folder / MANIFEST, manifest)


def is_sealed(folder: Path) -> bool:
    """Whether the folder has a manifest and all its files are as the manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(
            (folder / name).stat().st_size == size and _sha256(folder / name) == digest
            for name, (size, digest) in manifest.items()
        )
    except (OSError, ValueError):
        return False


def newest_sealed(output_dir: str | Path) -> str | None:
    """The checkpoint to resume from, or None; unfinished newer ones are renamed, out of the Trainer's sight."""
    for folder in _checkpoints(Path(output_dir)):
        if is_sealed(folder):
            return str(folder)
        aside = folder.with_name(f"unfinished-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return None


class SealCheckpoints(TrainerCallback):
    """Seal every checkpoint that the Trainer saves. Needs `save_total_limit` of at least 2 (or none): the Trainer
    deletes the old checkpoint before this callback has sealed the new one."""

    def on_train_begin(self, args, state, control, **kwargs):
        if args.save_total_limit is not None and args.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit must be at least 2 with SealCheckpoints, got {args.save_total_limit}: with 1, a "
                "kill while saving leaves no complete checkpoint."
            )

    def on_save(self, args, state, control, **kwargs):
        seal(Path(args.output_dir, f"checkpoint-{state.global_step}"))


def _checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
