"""What a compiled kernel multiplies with, and what its inner loop holds: read from PTX, SASS and amdgcn.

Of the loops without a loop inside, it is the one that multiplies most; where none multiplies, the one with most loads.
"""

import math
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
# NVIDIA's and AMD's names, by the beginning of an instruction
MATRIX = re.compile(r"(?:UTC)?[DHQIBO]G?MMA|v_mfma")
LOAD = re.compile(r"LDG(?!DEPBAR)|UBLKCP|UTMALDG|global_load|buffer_load")
ASYNCHRONOUS = re.compile(r"LDGSTS|UBLKCP|UTMALDG|(?:global|buffer)_load\w*.*\blds\b")


@dataclass(frozen=True)
class Loop:
    """Instructions of the inner loop, a warp's: all, and of these the matrix products, loads, asynchronous loads."""

    instructions: int
    matrix: int
    loads: int
    asynchronous: int


def matrix_instruction(text: str) -> str:
    """The largest matrix instruction of PTX or amdgcn, such as "wgmma m64n256k16"; empty without any."""
    shapes = {("wgmma", *shape) for shape in re.findall(r"wgmma\.mma_async\S*?\.m(\d+)n(\d+)k(\d+)\.", text)}
    shapes |= {("mma", *shape) for shape in re.findall(r"\bmma\.sync\S*?\.m(\d+)n(\d+)k(\d+)\.", text)}
    shapes |= {("mfma", *shape) for shape in re.findall(r"v_mfma_\w+?_(\d+)x(\d+)x(\d+)", text)}
    shapes |= set(_tcgen05(text))
    largest = max(shapes, key=lambda shape: int(shape[1]) * int(shape[2]) * int(shape[3]), default=None)
    if largest is None:
        return ""
    name, m, n, k = largest
    return f"{name} m{m}n{n}k{k}"


def _tcgen05(ptx: str) -> Iterator[tuple[str, str, str, str]]:
    """Shapes from the instruction descriptors: N / 8 in bits 17 to 22, M / 16 in bits 24 to 28; K is 32 bytes."""
    used = re.findall(r"tcgen05\.mma\S*kind::(\w+) \[[^\]]*\], \S+, \S+, (%r\d+),", ptx)
    for kind, register in set(used):
        for value in re.findall(rf"mov\.b32\s+{register}, (\d+);", ptx):
            bits = int(value)
            depth = {"f16": 16, "tf32": 8}.get(kind, 32)
            yield "tcgen05", str((bits >> 24 & 31) * 16), str((bits >> 17 & 63) * 8), str(depth)


def tensor_memory(ptx: str) -> int:
    """Columns of tensor memory that a program takes (sm_100)."""
    return sum(map(int, re.findall(r"tcgen05\.alloc\.\S+ \[[^\]]*\], (\d+);", ptx)))


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([NVDISASM, "-c", file.name], check=True, capture_output=True, text=True)
    return done.stdout


def inner_loop(text: str) -> Loop | None:
    """The inner loop of SASS as nvdisasm prints it, or of amdgcn; None where nothing loops around loads."""
    lines, labels = _instructions(text)
    loops = []
    for end, line in enumerate(lines):
        target = re.match(r"(?:BRA\S*|s_cbranch\S*|s_branch)\b.*?(\.L\w+)", line)
        start = labels.get(target[1], end + 1) if target else end + 1
        if any(MATRIX.match(line) or LOAD.match(line) for line in lines[start : end + 1]):
            loops.append((start, end + 1))
    innermost = [lines[slice(*loop)] for loop in loops if not any(_inside(other, loop) for other in loops)]
    best = max(innermost, key=lambda loop: (_multiplied(loop), _count(loop).loads), default=None)
    return None if best is None else _count(best)


def _inside(loop: tuple[int, int], other: tuple[int, int]) -> bool:
    return loop != other and other[0] <= loop[0] and loop[1] <= other[1]


def _multiplied(lines: list[str]) -> int:
    """How much a loop multiplies, as far as its instructions name their shapes."""
    names = (line.split()[0] for line in lines if MATRIX.match(line))
    return sum(math.prod(map(int, re.findall(r"\d+(?=x)|(?<=x)\d+", name))) for name in names)


def _instructions(text: str) -> tuple[list[str], dict[str, int]]:
    """Instructions without address and predicate, and the labels' places among them."""
    lines, labels = [], {}
    for raw in text.splitlines():
        label = re.match(r"(\.L\w+):", raw)
        if label:
            labels[label[1]] = len(lines)
            continue
        found = re.match(r"\s+(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Za-z][\w.]*\b.*)", raw)
        if found and not raw.lstrip().startswith((".", ";", "//")):
            lines.append(found[1])
    return lines, labels


def _count(lines: list[str]) -> Loop:
    matrix = sum(bool(MATRIX.match(line)) for line in lines)
    loads = sum(bool(LOAD.match(line)) for line in lines)
    return Loop(len(lines), matrix, loads, sum(bool(ASYNCHRONOUS.match(line)) for line in lines))
