"""Clocks: wall time on a CPU, on a GPU the time between two events of a queue that was full before the first."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# cycles of a multiprocessor: about 2 ms and 0.13 s at 2 GHz
FIRST_SLEEP, LONGEST_SLEEP = 1 << 22, 1 << 28
DEVICE_CLOCK = (
    "between two events on the device; before the first the L2 cache is overwritten and the device sleeps until the "
    "CPU has queued the whole run, so that launches are not counted; who waits for the device itself, or launches "
    "more than its queue holds, is `late`: its launches are counted"
)


@dataclass(frozen=True)
class Contestant:
    """`run` is timed; `prepare` restores the state before a run, untimed."""

    run: Callable[[], object]
    prepare: Callable[[], None] = lambda: None


class Timer(Protocol):
    """Seconds of one run a call; `late` once launches by the CPU were part of them."""

    late: bool

    def __call__(self) -> float: ...


class Clock(Protocol):
    def timer(self, contestant: Contestant) -> Timer: ...


class CpuClock:
    """Wall time."""

    def timer(self, contestant: Contestant) -> "CpuTimer":
        return CpuTimer(contestant)


@dataclass
class CpuTimer:
    contestant: Contestant
    late: bool = False

    def __call__(self) -> float:
        self.contestant.prepare()
        start = time.perf_counter()
        self.contestant.run()
        return time.perf_counter() - start


class CudaClock:
    """Time on the device, without what the CPU needs to launch."""

    def __init__(self) -> None:
        size = 4 * torch.cuda.get_device_properties(0).L2_cache_size
        self._scratch = torch.empty(max(size, 256 << 20), dtype=torch.int8, device="cuda")

    def timer(self, contestant: Contestant) -> "CudaTimer":
        return CudaTimer(contestant, self._scratch)


@dataclass
class CudaTimer:
    """The device sleeps twice as long from the first sample on that it began before everything was queued."""

    contestant: Contestant
    scratch: Tensor
    sleep: int = FIRST_SLEEP
    late: bool = False

    def __call__(self) -> float:
        seconds, early = self._sample()
        while early and not self.late and self.sleep < LONGEST_SLEEP:
            self.sleep *= 2
            seconds, early = self._sample()
        if early and not self.late:  # no sleep is long enough
            self.late, self.sleep = True, FIRST_SLEEP
        return seconds

    def _sample(self) -> tuple[float, bool]:
        """Seconds of one run, and whether the device began before everything was queued."""
        self.contestant.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.scratch.zero_()
        torch.cuda._sleep(self.sleep)
        start.record()
        self.contestant.run()
        end.record()
        early = start.query()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, early
