"""How many programs of a kernel a multiprocessor runs at once, from registers, shared memory and warps.

Limits of NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Of AMD: its manual of
the instructions of CDNA 3, "VGPRs" and "LDS".
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor (AMD: compute unit)."""

    warps: int
    programs: int
    shared_memory: int  # bytes
    reserved: int  # bytes of shared memory that every program takes beside its own
    registers: int = 65536  # of 32 bits, of all threads; AMD: vector registers
    register_unit: int = 8  # registers of a thread are handed out in these steps
    lanes: int = 32
    tensor_memory: int = 0  # columns


LIMITS = {
    "sm_80": Limits(64, 32, 167936, 1024),
    "sm_86": Limits(48, 16, 102400, 1024),
    "sm_89": Limits(48, 24, 102400, 1024),
    "sm_90": Limits(64, 32, 233472, 1024),
    "sm_100": Limits(64, 32, 233472, 1024, tensor_memory=512),
    "sm_103": Limits(64, 32, 233472, 1024, tensor_memory=512),
    "sm_120": Limits(48, 24, 102400, 1024),
    # four SIMDs, each with 8 waves of 64 lanes and 512 registers a lane
    "gfx90a": Limits(32, 32, 65536, 0, registers=4 * 512 * 64, lanes=64),
    "gfx942": Limits(32, 32, 65536, 0, registers=4 * 512 * 64, lanes=64),
}
PARTITIONS = 4  # schedulers, or SIMDs: each has a quarter of the registers, and a warp stays in one


def programs(chip: str, num_warps: int, registers: int, shared_memory: int, tensor_memory: int = 0) -> int:
    """Programs of `num_warps` warps that fit one multiprocessor of a chip; 0 if not even one does."""
    limits = LIMITS[chip]
    steps = -(-max(registers, 1) // limits.register_unit) * limits.register_unit
    warps = min(limits.warps, limits.registers // PARTITIONS // (steps * limits.lanes) * PARTITIONS)
    fits = [limits.programs, warps // num_warps, limits.shared_memory // max(shared_memory + limits.reserved, 1)]
    if tensor_memory:
        fits.append(limits.tensor_memory // tensor_memory)
    return min(fits)
