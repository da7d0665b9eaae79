"""Times of several contestants in one run: round by round in a random order, medians of each round's ratios."""

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .clocks import Clock, Contestant, Timer

MIN_ROUNDS, MAX_ROUNDS = 3, 200
SLOW, SLOW_ROUNDS = 5.0, 2
DISTURBED, ATTEMPTS = 0.05, 3
METHOD = (
    "every contestant once a round, in a random order; median of the rounds' times, and of the ratios within a round; "
    f"at least {MIN_ROUNDS} rounds, then until the budget is spent; who takes more than {SLOW:g} times as long as the "
    f"fastest native takes part in {SLOW_ROUNDS} rounds only; gradients are set to None before each call; measured "
    f"again, up to {ATTEMPTS} times in all, while other processes use more than {DISTURBED:.0%} of the cores"
)


class Timing(NamedTuple):
    """What `time_undisturbed` found.

    Attributes:
        seconds: Of every contestant by round; lists of slow contestants are shorter.
        late: Contestants whose launches by the CPU are part of their times.
        others: Share of the cores that other processes used meanwhile.
    """

    seconds: dict[str, list[float]]
    late: set[str]
    others: float


def time_undisturbed(
    contestants: Mapping[str, Contestant], clock: Clock, budget: float, natives: Sequence[str]
) -> Timing:
    """`time_rounds`, again while other processes take part."""
    found = []
    for _ in range(ATTEMPTS):
        before = _used_seconds()
        seconds, late = time_rounds(contestants, clock, budget, natives)
        busy, own, wall = (after - start for after, start in zip(_used_seconds(), before, strict=True))
        found.append(Timing(seconds, late, max(busy - own, 0.0) / wall / (os.cpu_count() or 1)))
        if found[-1].others <= DISTURBED:
            break
    return min(found, key=lambda attempt: attempt.others)


def _used_seconds() -> tuple[float, float, float]:
    """CPU seconds of the whole machine, stolen ones too, and of this process (0 where no one says), and the time."""
    try:
        user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9])
    except OSError:
        return 0.0, 0.0, time.perf_counter()
    own = os.times()
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return busy, own.user + own.system, time.perf_counter()


def time_rounds(
    contestants: Mapping[str, Contestant], clock: Clock, budget: float, natives: Sequence[str]
) -> tuple[dict[str, list[float]], set[str]]:
    """Seconds of every contestant by round, and who is late (`Timing`)."""
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in contestants}
    timers: dict[str, Timer] = {name: clock.timer(contestant) for name, contestant in contestants.items()}
    warm = {name: timer() for name, timer in timers.items()}
    fastest = min((warm[name] for name in natives if name in warm), default=float("inf"))
    slow = {name for name, seconds in warm.items() if seconds > SLOW * fastest}
    gc.collect()
    gc.disable()
    try:
        spent = 0.0
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and spent > budget:
                break
            order = [name for name in contestants if done < SLOW_ROUNDS or name not in slow]
            shuffle(order)
            for name in order:
                start = time.perf_counter()
                times[name].append(timers[name]())
                spent += 0.0 if name in slow else time.perf_counter() - start
    finally:
        gc.enable()
    return times, {name for name, timer in timers.items() if timer.late}


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median of the rounds' ratios, over the rounds in which both ran."""
    return statistics.median(a / b for a, b in zip(times, others, strict=False))


def saved_bytes(forward: Callable[[], Tensor], excluded: nn.Module) -> int:
    """Bytes of the distinct storages that `forward` saves for backward, without the parameters of `excluded`."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in excluded.parameters()}
    kept: list[Tensor] = []  # alive until all are counted, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    del out
    return sum(size for address, size in storages.items() if address not in parameters)


def reached(clock: Clock, device: str, size: int = 8192) -> tuple[float, float]:
    """TFLOP/s of a bfloat16 product of `size`, and TB/s of a copy, medians of 9.

    Of random values: on constant ones a GPU draws less power and runs up to an eighth faster.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape, options = (size, size), {"generator": generator, "device": device}
    left, right = (torch.randn(shape, **options).bfloat16() for _ in range(2))
    source = torch.randint(-128, 128, (8 * size * size,), dtype=torch.int8, **options)
    target = torch.empty_like(source)

    def median_seconds(run: Callable[[], object]) -> float:
        timer = clock.timer(Contestant(run))
        timer()
        return statistics.median(timer() for _ in range(9))

    product, copy = median_seconds(lambda: left @ right), median_seconds(lambda: target.copy_(source))
    return 2 * size**3 / product / 1e12, 2 * source.nbytes / copy / 1e12


def peak_bytes(run: Callable[[], Tensor], device: str) -> tuple[Tensor, int | None]:
    """The result of `run`, and on a GPU the memory that it needed beyond what was there."""
    if device != "cuda":
        return run(), None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def captured(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A replay of the CUDA graph of `forward`; its result stays in one place.

    Raises:
        RuntimeError: If `forward` waits for the device, which a graph cannot hold. A capture that fails would leave
            this process on the capture's stream, its allocator as if it went on.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):  # compiles and tunes
            forward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            forward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = forward()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay
