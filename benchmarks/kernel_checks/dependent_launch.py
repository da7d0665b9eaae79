"""Kernels that start while the kernel in front of them runs: what that one writes is read after the wait alone.

PTX keeps the order of what touches memory, so up to `griddepcontrol.wait` the registers are followed that hold
something computed from the argument.
"""

import re

from .launches import Launch

# argument that the kernel in front writes
WRITTEN_IN_FRONT = {"decode_down_kernel": "act"}
WAIT = "griddepcontrol.wait"
READS = ("ld.global", "cp.async")
REGISTER = r"%[a-z]+\d+"


def require_wait(launch: Launch, ptx: str) -> None:
    """Refuse a kernel launched with `launch_pdl` that may read what is not written yet.

    Raises:
        ValueError: If it does not wait on every path, or reads before.
    """
    name = WRITTEN_IN_FRONT[launch.kernel]
    place = [argument for argument, kind in launch.signature if kind != "constexpr"].index(name)
    lines = [line.strip() for line in ptx.splitlines()]
    wait = next((at for at, line in enumerate(lines) if line.startswith(WAIT)), None)
    if wait is None or any(" bra" in line or line.startswith("ret") for line in lines[:wait]):
        raise ValueError(f"{launch.kernel} starts early: it must execute {WAIT}, on every path.")
    if early := reads_through(lines[:wait], f"{launch.kernel}_param_{place}"):
        raise ValueError(
            f"{launch.kernel} starts early: it must wait with {WAIT} before it reads {name}, found {early}."
        )


def reads_through(lines: list[str], parameter: str) -> list[str]:
    """Instructions that read memory at an address computed from a kernel's parameter."""
    holding: set[str] = set()
    reads = []
    for line in lines:
        instruction = re.sub(r"^@!?%p\d+\s+", "", line)
        operation, _, operands = instruction.replace("\t", " ").partition(" ")
        result, *sources = re.split(r",(?![^{]*\})", operands)
        if f"[{parameter}]" in operands or holding & set(re.findall(REGISTER, " ".join(sources))):
            holding |= set(re.findall(REGISTER, result))
            if operation.startswith(READS):
                reads.append(instruction)
    return reads
