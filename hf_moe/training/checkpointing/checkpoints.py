"""Checkpoints that an interruption cannot corrupt.

A checkpoint counts only once a manifest of its files' sizes and SHA-256, written last, says that it is complete: the
Trainer of transformers writes file by file into the final folder and resumes from the highest number unchecked.
"""

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.utils import logging

from hf_moe.io.json_files import read_json
from hf_moe.io.whole_files import flush, is_temporary, move_into_place, remove_temporaries, write_json

logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
_LARGEST_MANIFEST = 16 * 2**20  # bytes
UNFINISHED = "_unfinished"
"""Where a checkpoint is written before it moves into its place; transformers pushes no name that begins with "_"."""

_CHECKPOINT = re.compile(r"checkpoint-[0-9]+")
SKIPPED = "_skipped-"
"""Put before the name of a checkpoint that cannot be trusted."""


TOKEN_IS_PICKLED = (
    "hub_token would be written into training_args.bin, which a push publishes. Leave it out and set HF_TOKEN, or log "
    "in with `hf auth login`."
)


class CheckpointError(OSError):
    """A checkpoint cannot be written or used; says why, what is still there, and what to do."""


def seal(folder: Path) -> None:
    """Flush every file to disk, then write the manifest that marks the checkpoint as complete.

    A checkpoint that another program wrote, and that you know to be whole, can be sealed by hand.
    """
    _seal(folder, {}, list(_files(folder)))


def seal_additions(folder: Path) -> None:
    """Bring the manifest of a sealed checkpoint up to date with files that came, or changed, after it was written."""
    known = _read_manifest(folder)
    # ">=" below: many a file system counts in ticks, and what changed within the manifest's own must not be missed
    sealed_at = (folder / MANIFEST).stat().st_mtime_ns
    names = {path: path.relative_to(folder).as_posix() for path in _files(folder)}
    later = [path for path, name in names.items() if name not in known or path.stat().st_mtime_ns >= sealed_at]
    if later:
        _seal(folder, known, later)


def flaw(folder: Path) -> str | None:
    """Reason not to trust a checkpoint; None if it has a manifest and all its files are as the manifest says."""
    try:
        manifest = _read_manifest(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished, or another program wrote it"
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    try:
        for name, (size, _) in manifest.items():  # sizes first: they cost nothing
            found = (folder / name).stat()
            if not stat.S_ISREG(found.st_mode):
                return f"{name} is no file"
            if found.st_size != size:
                return f"{name} has {found.st_size:,} bytes instead of {size:,}"
        hashes = _hashes({folder / name for name in manifest})
        for name, (_, digest) in manifest.items():
            if hashes[folder / name] != digest:
                return f"{name} has changed since it was saved (SHA-256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder).as_posix()} is missing"
    except OSError as error:
        return f"a file cannot be read ({error})"
    return None


def sealed_bytes(folder: Path) -> int:
    """Size of a checkpoint, from its manifest; 0 if it has none that can be read."""
    try:
        return sum(size for size, _ in _read_manifest(folder).values())
    except (OSError, ValueError):
        return 0


def _seal(folder: Path, known: dict[str, tuple[int, str]], paths: list[Path]) -> None:
    manifest = dict(known)
    for path, digest in _hashes(paths).items():
        manifest[path.relative_to(folder).as_posix()] = (path.stat().st_size, digest)
    flush(folder)
    write_json(folder / MANIFEST, dict(sorted(manifest.items())))


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 by file name. Raises OSError, or ValueError if it is no manifest."""
    manifest = read_json(folder / MANIFEST, largest=_LARGEST_MANIFEST)
    if not isinstance(manifest, dict) or not manifest:
        raise ValueError("it lists no files")
    for name, entry in manifest.items():
        if not (isinstance(entry, list) and len(entry) == 2 and type(entry[0]) is int and isinstance(entry[1], str)):
            raise ValueError(f"the entry of {name!r:.200} is no size and hash")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise ValueError(f"{name!r:.200} lies outside of the checkpoint")
    return {name: (size, digest) for name, (size, digest) in manifest.items()}


def _files(folder: Path) -> Iterator[Path]:
    """Files of a checkpoint that is no longer written to: a temporary file is of a writer that was killed."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and is_temporary(path.name):
            path.unlink()
        elif path.is_file() and path.name != MANIFEST:
            yield path


def _hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of each file, several at a time: hashing and reading release the interpreter."""
    listed = list(paths)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(listed, pool.map(_sha256, listed), strict=True))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class SealCheckpoints(TrainerCallback):
    """Seal every checkpoint of a Trainer that cannot have the `SafeCheckpointMixin`; resume from `newest_sealed`.

    Put it last among the callbacks: what the others write belongs to the checkpoint. Needs `save_total_limit` of at
    least 2 (or none): the Trainer deletes the old checkpoint before this callback has sealed the new one.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        refuse_one_checkpoint(args.save_total_limit)

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            seal(Path(args.output_dir, f"checkpoint-{state.global_step}"))


def refuse_one_checkpoint(save_total_limit: int | None) -> None:
    """Raises ValueError if the Trainer keeps one checkpoint only, and so deletes the old before the new is sealed."""
    if save_total_limit is not None and save_total_limit < 2:
        raise ValueError(
            f"save_total_limit must be at least 2 where checkpoints are sealed in place, got {save_total_limit}: with "
            "1, a kill while saving leaves no complete checkpoint."
        )


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint folders, newest first, whatever state they are in."""
    found = [path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def _warn_of_others(output_dir: Path) -> None:
    """Warn of what looks like a checkpoint and is none: digits of other alphabets, files."""
    for path in sorted(output_dir.glob("checkpoint-*")):
        if re.fullmatch(r"checkpoint-\d+", path.name) and not (_CHECKPOINT.fullmatch(path.name) and path.is_dir()):
            why = "its number is not written in the digits 0 to 9" if path.is_dir() else "it is no folder"
            logger.warning(f"Skipped {str(path)!r}, which is no checkpoint: {why}.")


def newest_sealed(output_dir: str | Path) -> str | None:
    """The newest checkpoint whose files are all as its manifest says, or None.

    Newer ones that cannot be trusted are named in a warning, with the reason, and renamed to
    `_skipped-checkpoint-N`: the Trainer, which checks nothing, would resume from them.
    """
    _warn_of_others(Path(output_dir))
    for folder in checkpoints(Path(output_dir)):
        reason = flaw(folder)
        if reason is None:
            return str(folder)
        aside = _place_aside(folder)
        folder.rename(aside)
        logger.warning(f"Skipped {str(folder)!r}, which is now {aside.name!r}: {reason}.")
    return None


def _place_aside(folder: Path) -> Path:
    """Free for `folder`: in place of what was put there earlier, or beside what others have put there."""
    aside = folder.with_name(SKIPPED + folder.name)
    if aside.is_dir() and not aside.is_symlink():
        shutil.rmtree(aside, ignore_errors=True)
    number = 1
    while aside.exists() or aside.is_symlink():
        number += 1
        aside = folder.with_name(f"{SKIPPED}{folder.name}-{number}")
    return aside


def delete_old_checkpoints(output_dir: Path, most: int | None, keep: set[Path]) -> None:
    """Delete the oldest until at most `most` are left; never one of `keep`. To be called once the newest is sealed."""
    if most is None or most <= 0:
        return
    found = [folder for folder in checkpoints(output_dir) if not folder.is_symlink()]
    # by time, as the Trainer does: those of an earlier run in the folder may have higher numbers
    oldest_first = sorted(set(found) - keep, key=lambda path: (path.stat().st_mtime_ns, _step(path)))
    for folder in oldest_first[: max(0, len(found) - max(most, len(keep)))]:
        try:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: half deleted is not valid
            shutil.rmtree(folder)
        except OSError as error:  # no reason to end a run whose newest checkpoint is whole
            logger.warning(f"The old checkpoint {str(folder)!r} could not be deleted: {error}. Delete it by hand.")


def clean_up(output_dir: str | Path) -> None:
    """Remove the temporary files that a killed run left in the folder.

    A checkpoint that was whole, but not yet in its place, is put there.
    """
    unfinished = Path(output_dir, UNFINISHED)
    for folder in checkpoints(unfinished):
        if flaw(folder) is None:
            move_into_place(folder, Path(output_dir, folder.name))
    shutil.rmtree(unfinished, ignore_errors=True)
    remove_temporaries(Path(output_dir))


def free_bytes(folder: Path) -> int:
    """Free bytes where the folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def write_failure(error: Exception) -> str | None:
    """Reason for which a file could not be written, or None if the error is about something else.

    safetensors and torch report a full disk as errors of their own.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    text = str(error)
    if isinstance(error, SafetensorError) and (number := re.search(r"os error (\d+)", text)):
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and re.search("inline_container|PytorchStreamWriter|cannot be opened", text):
        return f"{os.strerror(errno.ENOSPC)}, or no permission (torch says: {text.splitlines()[0]})"
    return None
