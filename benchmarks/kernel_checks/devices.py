"""The time of a launch, and the rates of devices that it assumes; none of them is a measurement of ours.

A launch takes the time of its slowest resource times a factor, a constant, and what nothing hides of its epilogue.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from .traffic import Traffic

START_US = 1.5  # a kernel's start, first loads and last stores: assumed
GAP_US = 1.0  # from a kernel's end to the start of the next one in a graph, unless that one may start early: assumed
# the time of a launch over that of its slowest resource: assumed
PRODUCT_FACTOR = 1.08
GRADIENT_FACTOR = 1.125
STREAMING_FACTOR = 1.13
FACTORS = {
    "up_kernel": PRODUCT_FACTOR,
    "grouped_linear_kernel": PRODUCT_FACTOR,
    "backward_activation_kernel": PRODUCT_FACTOR,
    "weight_gradient_kernel": GRADIENT_FACTOR,
}
# share of the epilogue's memory traffic that nothing hides where only one program fits a multiprocessor: assumed
EXPOSED_EPILOGUE = 0.5


class Compiled(NamedTuple):
    """What the compiler made of a launch, as far as its time depends on it.

    Attributes:
        programs: That a multiprocessor runs at once; None where that was not asked.
        matrix: The matrix instruction, such as "wgmma m64n256k16".
        early: Whether it starts while the kernel before it still runs.
    """

    kernel: str = ""
    programs: int | None = None
    matrix: str = ""
    early: bool = False


@dataclass(frozen=True)
class Device:
    """One device of a chip.

    Attributes:
        tflops: 16-bit products with 32-bit sums, reached by a large one on random data.
        hbm_tbs: Memory, reached by a large copy, TB/s.
        l2_tbs: L2 to all multiprocessors, TB/s.
        l2_bytes: Capacity of the cache in front of the memory.
        source: Of the rates.
        shared_tbs: Shared memory of all multiprocessors, TB/s, for wgmma, which reads both operands there.
    """

    chip: str
    tflops: float
    hbm_tbs: float
    l2_tbs: float
    l2_bytes: float
    source: str
    shared_tbs: float | None = None

    def resources(self, work: Traffic, compiled: Compiled) -> dict[str, float]:
        """Milliseconds that each resource needs."""
        needed = {
            "tensor cores": work.flops / self.tflops / 1e9,
            "memory": work.hbm / self.hbm_tbs / 1e9,
            "L2": work.l2 / self.l2_tbs / 1e9,
        }
        if self.shared_tbs is not None:
            moved = work.flops * operand_bytes(compiled.matrix) + work.l2
            needed["shared memory"] = moved / self.shared_tbs / 1e9
        return needed

    def milliseconds(self, work: Traffic, compiled: Compiled) -> float:
        """Of one launch."""
        slowest = max(self.resources(work, compiled).values())
        exposed = EXPOSED_EPILOGUE * work.epilogue / self.hbm_tbs / 1e9 if compiled.programs == 1 else 0.0
        launch = (START_US if compiled.early else START_US + GAP_US) / 1e3
        return launch + FACTORS.get(compiled.kernel, STREAMING_FACTOR) * slowest + exposed


def operand_bytes(matrix: str) -> float:
    """Bytes that wgmma reads from shared memory for each of its FLOPs; 0 for other instructions."""
    shape = re.fullmatch(r"wgmma m(\d+)n(\d+)k(\d+)", matrix)
    if shape is None:
        return 0.0
    m, n, k = map(int, shape.groups())
    return 32 * (m + n) / (2 * m * n * k)  # k elements are 32 bytes in every dtype


# shared memory: 128 bytes a clock, at the clock at which 4096 FLOPs a clock are 790 TFLOP/s
_HOPPER = "published products and copies; L2 assumed, from the 600 TFLOP/s of a plain product in Triton"
DEVICES = {
    "A100": Device("sm_80", 250, 1.75, 4.5, 40e6, "assumed: 80 % of 312 TFLOP/s, 86 % of 2.04 TB/s; L2 guessed"),
    "H100": Device("sm_90", 790, 3.0, 7.0, 50e6, _HOPPER, 24.7),
    "H200": Device("sm_90", 790, 4.0, 7.0, 50e6, _HOPPER, 24.7),
    "B200": Device("sm_100", 1500, 6.8, 10.0, 126e6, "assumed: 67 % of 2250 TFLOP/s, 85 % of 8 TB/s; L2 guessed"),
    "RTX 5090": Device("sm_120", 200, 1.55, 5.0, 96e6, "assumed: 95 % of 210 TFLOP/s, 87 % of 1.79 TB/s; L2 guessed"),
    "MI300X": Device("gfx942", 600, 4.2, 12.0, 256e6, "assumed: 46 % of 1307 TFLOP/s, 80 % of 5.3 TB/s; L2 guessed"),
}
