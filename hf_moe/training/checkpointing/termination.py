"""SIGTERM, which schedulers send before they kill: handled between two steps, by all processes after the same one."""

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from hf_moe.io.whole_files import write_text
from hf_moe.training.checkpointing.cpu_copy import CpuCopy

EXIT_CODE = 75
"""Of a run that SIGTERM ended and that continues when it is started again: EX_TEMPFAIL of sysexits.h."""


RESUMABLE = "RESUMABLE"
"""A file in the output folder of such a run, with the checkpoint's name: `torchrun` and `accelerate launch` end with 1
whatever their processes ended with. It is deleted as soon as the run continues."""


class Terminated(SystemExit):
    """SIGTERM came; the checkpoint is saved. Ends the program with `EXIT_CODE`.

    With 143, as SIGTERM itself would, where no run can be resumed from the checkpoint.
    """

    def __init__(self, checkpoint: str, is_resumable: bool = True):
        super().__init__(EXIT_CODE if is_resumable else 128 + signal.SIGTERM)
        self.checkpoint = checkpoint


def mark_resumable(output_dir: Path, checkpoint: Path) -> None:
    """Write `RESUMABLE`."""
    write_text(output_dir / RESUMABLE, checkpoint.name + "\n")


def unmark_resumable(output_dir: Path) -> None:
    """Delete `RESUMABLE`, if it is ours."""
    mark = output_dir / RESUMABLE
    if mark.is_file() and re.fullmatch(rb"checkpoint-\d+\n", mark.read_bytes()[:100]):
        mark.unlink()


class TerminationRequest:
    """Context manager in which SIGTERM, once or repeated, is remembered and does not end the program.

    One that comes after the last step has its ordinary effect when training is over. Outside of the main thread, where
    Python allows no handlers, SIGTERM keeps its effect.
    """

    def __init__(self) -> None:
        self.received = False
        self.listening = multiprocessing.RawValue("b", 0)
        """1 while open; other processes see it."""
        self._earlier: Any = None
        self._flag: CpuCopy | None = None

    def __enter__(self) -> "TerminationRequest":
        self.received, self._flag, self.listening.value = False, None, 1
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._remember)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.listening.value = 0
        if threading.current_thread() is threading.main_thread():
            # None stands for a handler from outside of Python, which cannot be put back
            signal.signal(signal.SIGTERM, self._earlier or signal.SIG_DFL)
            if self.received and kind is None:
                signal.raise_signal(signal.SIGTERM)

    def agreed(self, device: torch.device) -> bool:
        """True if the run is to stop now, in every process alike. To be called by all, once a step.

        Several processes add up their flags and read the sum of the call before, which the device has ready: no
        process waits, and all stop one step later.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.received
        flag = torch.full((1,), float(self.received), device=device)
        dist.all_reduce(flag)
        earlier, self._flag = self._flag, CpuCopy(flag)
        return earlier is not None and earlier.tolist()[0] > 0

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True


@contextmanager
def sigterm_held() -> Iterator[None]:
    """Hold SIGTERM back until the end; in a worker started meanwhile, until `outlive_group_signal` is set up."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def outlive_group_signal(listening: Any, worker_init: Callable[[int], None] | None, worker: int) -> None:
    """Let the workers of a DataLoader survive a SIGTERM that is sent to the whole group of processes.

    Only while the run listens (`TerminationRequest.listening`): when it is over, and the main process ends workers
    that are left by SIGTERM, they go.
    """

    def leave_if_over(number: int, frame: FrameType | None) -> None:
        if not listening.value:
            os._exit(0)

    signal.signal(signal.SIGTERM, leave_if_over)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    if worker_init is not None:
        worker_init(worker)
