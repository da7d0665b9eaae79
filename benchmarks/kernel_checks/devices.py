"""What the estimates assume of the devices: rates that large products and copies reach. None was measured by us.

Matrix products: a large 16-bit product of cuBLAS or hipBLASLt on random data. Memory: a large copy. L2: what programs
read from it together.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """One device of a chip.

    Attributes:
        tflops: 16-bit products with 32-bit sums, reached.
        hbm_tbs: Memory, reached, TB/s.
        l2_tbs: L2 to all multiprocessors, TB/s.
        l2_bytes: Capacity of the cache in front of the memory.
        source: Of the rates.
    """

    chip: str
    tflops: float
    hbm_tbs: float
    l2_tbs: float
    l2_bytes: float
    source: str


DEVICES = {
    "A100": Device(
        "sm_80", 250, 1.75, 4.5, 40e6, "assumed: 80 % of 312 TFLOP/s, 86 % of 2.04 TB/s, L2 by clock and width"
    ),
    "H100": Device(
        "sm_90", 790, 3.0, 7.0, 50e6, "published products and copies; L2 assumed, from Triton's 600 TFLOP/s"
    ),
    "H200": Device(
        "sm_90", 790, 4.0, 7.0, 50e6, "published products and copies; L2 assumed, from Triton's 600 TFLOP/s"
    ),
    "B200": Device(
        "sm_100", 1500, 6.8, 10.0, 126e6, "assumed: 67 % of 2250 TFLOP/s, 85 % of 8 TB/s, L2 by clock and width"
    ),
    "RTX 5090": Device("sm_120", 200, 1.55, 5.0, 96e6, "assumed: 95 % of 210 TFLOP/s, 87 % of 1.79 TB/s, L2 guessed"),
    "MI300X": Device("gfx942", 600, 4.2, 12.0, 256e6, "assumed: 46 % of 1307 TFLOP/s, 80 % of 5.3 TB/s, L2 guessed"),
}

LAUNCH_US = 2.5  # a kernel's start, first loads and last stores, and the gap to the next one, in a graph: assumed
# the time of a launch over that of its slowest resource: assumed
PRODUCT_FACTOR = 1.08
GRADIENT_FACTOR = 1.125
STREAMING_FACTOR = 1.13
# Share of the epilogue's memory traffic that nothing hides where only one program fits a multiprocessor: assumed
EXPOSED_EPILOGUE = 0.5
