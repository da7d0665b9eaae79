"""Lock on a folder for one run at a time: a second is refused, naming the first, before it writes anything.

The lock is the kernel's (flock), so that a run that was killed blocks nobody; its file only says who holds it. Of
several processes of one run the main one takes it.
"""

import errno
import fcntl
import logging
import os
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from functools import wraps
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LOCK = "_run.lock"  # transformers pushes no name that begins with "_"
_NO_FILE = (errno.ELOOP, errno.EISDIR, errno.EINVAL, errno.ENXIO)
_SHOWN = 300

_held: dict[Path, int] = {}  # folder -> descriptor of its lock
_until_the_end: list[ExitStack] = []


class RunRefusedError(ValueError):
    """The folder belongs to something else: other files, other arguments, or a run that has not ended."""


@contextmanager
def folder_held(folder: str | Path, program: str | None = None, *, nested: bool = False) -> Iterator[None]:
    """Hold the folder, which is made if it is not there, while the block runs.

    Args:
        program: Name for the message that another run gets; default: the name of the program that runs.
        nested: Take part in what this process holds already.

    Raises:
        RunRefusedError: If another run holds it; names that run.
    """
    folder = Path(folder).resolve()
    if nested and folder in _held:
        yield
        return
    lock = _take(folder, program or Path(sys.argv[0]).name or "Python")
    if lock is None:
        yield
        return
    _held[folder] = lock
    try:
        yield
    finally:
        _release(folder)


def hold_until_the_end(folder: str | Path) -> None:
    """Hold the folder until the function that is decorated with `frees_folders` ends, or the process.

    Raises:
        RunRefusedError: If another run holds it.
    """
    held = ExitStack()
    held.enter_context(folder_held(folder, nested=True))
    _until_the_end.append(held)


def frees_folders(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: what `hold_until_the_end` took within `function` is free when it returns or raises."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before = len(_until_the_end)
        try:
            return function(*args, **kwargs)
        finally:
            while len(_until_the_end) > before:
                _until_the_end.pop().close()

    return run


def _take(folder: Path, program: str) -> int | None:
    """The descriptor of the locked file; None, with a warning, where files cannot be locked."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while (descriptor := _open_locked(path)) is None:
            pass  # its holder ended, and deleted it, in between
    except OSError as error:
        if error.errno in _NO_FILE:
            raise RunRefusedError(
                f"{str(path)!r} must be a file: it locks the folder. Delete what is there."
            ) from error
        # read-only, full, or a file system without locks: what the run writes there will fail with more detail
        logger.warning(f"{str(folder)!r} cannot be locked ({error.strerror}): start no second run in it.")
        return None
    since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    holder = f"{program} (process {os.getpid()} on {socket.gethostname()}, since {since})\n"
    with suppress(OSError):  # a full disk; the lock holds without it
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
    return descriptor


def _open_locked(path: Path) -> int | None:
    """None if the file is no longer the one of this name.

    Raises:
        RunRefusedError: If it is locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    is_ours = False
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_ours = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
    except BlockingIOError as error:
        other = " ".join(os.pread(descriptor, _SHOWN, 0).decode("utf-8", "replace").split()) or "it has just begun"
        raise RunRefusedError(
            f"another run works in {str(path.parent)!r}: {other}. Wait for it or end it, or choose another folder."
        ) from error
    finally:
        if not is_ours:
            os.close(descriptor)
    return descriptor if is_ours else None


def _release(folder: Path) -> None:
    descriptor = _held.pop(folder, None)
    if descriptor is None:  # in a child, which holds nothing
        return
    with suppress(OSError):  # deleted with its folder, perhaps
        os.unlink(folder / LOCK)
    os.close(descriptor)


def _forget_in_child() -> None:
    """A worker that outlives a killed run must not hold its folder."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
