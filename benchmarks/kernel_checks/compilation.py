"""Compile a recorded launch for a chip that is not there, and read what it needs.

Triton compiles without a GPU and brings the assemblers. Registers, stack and spills come from ptxas' own log (NVIDIA)
or from the assembly's metadata (AMD: spills counted in registers), shared memory from Triton, instructions from the
text.
"""

import contextlib
import importlib
import io
import re
from dataclasses import dataclass

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .dependent_launch import require_wait
from .instructions import Loop, disassemble, inner_loop, matrix_instruction, tensor_memory
from .launches import Launch
from .occupancy import programs

INSTRUCTIONS = {
    "mma": r"mma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma",
    "cp.async": r"cp\.async\.c[ag]",
}


@dataclass(frozen=True)
class Chip:
    """The limits and instructions of a GPU: `tensor_core` for products of at least 64 rows, `small` for lower ones."""

    target: GPUTarget
    shared_memory: int  # bytes that one block may use
    tensor_core: str
    small: str

    @property
    def has_fp8(self) -> bool:
        """Whether float8_e4m3fn is converted in hardware."""
        return self.target.backend == "cuda" and self.target.arch >= 89


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 166912, "mma", "mma"),
    "sm_86": Chip(GPUTarget("cuda", 86, 32), 101376, "mma", "mma"),
    "sm_89": Chip(GPUTarget("cuda", 89, 32), 101376, "mma", "mma"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 232448, "wgmma", "mma"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 232448, "tcgen05", "mma"),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), 101376, "mma", "mma"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 65536, "mfma", "mfma"),
    # without a table of their own: they get tiles/default.json
    "sm_103": Chip(GPUTarget("cuda", 103, 32), 232448, "tcgen05", "mma"),
    "gfx90a": Chip(GPUTarget("hip", "gfx90a", 64), 65536, "mfma", "mfma"),
}


@dataclass(frozen=True)
class Resources:
    """Resources that one program needs."""

    registers: int  # per thread
    spilled: int  # NVIDIA: bytes stored and loaded; AMD: registers
    stack: int  # bytes per thread
    shared_memory: int  # bytes
    instructions: dict[str, int]
    dot_rows: int  # of the highest product of 16-bit values, 0 without any
    matrix: str  # the largest matrix instruction
    programs: int  # that one multiprocessor runs at once
    loop: Loop | None = None  # the inner one, if asked for


def compile_launch(launch: Launch, name: str, read_loop: bool = False) -> Resources:
    """Compile for the chip of that name. `read_loop`: disassemble, too."""
    chip = CHIPS[name]
    function = getattr(importlib.import_module(launch.module), launch.kernel)
    attributes = {(at,): [list(fact) for fact in facts] for at, facts in launch.attributes}
    source = ASTSource(function, dict(launch.signature), dict(launch.constants), attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):  # TRITON_DUMP_PTXAS_LOG
        kernel = triton.compile(source, target=chip.target, options=dict(launch.options))
    if chip.target.backend == "cuda":
        text = kernel.asm["ptx"]
        if kernel.metadata.launch_pdl:
            require_wait(launch, text)
        registers, spilled, stack = read_ptxas_log(log.getvalue())
    else:
        text = kernel.asm["amdgcn"]
        registers, spilled, stack = read_amdgcn(text)
    counts = {kind: len(re.findall(pattern, text)) for kind, pattern in INSTRUCTIONS.items()}
    shared, num_warps = kernel.metadata.shared, kernel.metadata.num_warps
    found = {kind: count for kind, count in counts.items() if count}
    fitting = programs(name, num_warps, registers, shared, tensor_memory(text))
    loop = None
    if read_loop:
        loop = inner_loop(disassemble(kernel.asm["cubin"]) if chip.target.backend == "cuda" else text)
    needs = (registers, spilled, stack, shared, found, dot_rows(kernel.asm["ttir"]))
    return Resources(*needs, matrix_instruction(text), fitting, loop)


def read_ptxas_log(log: str) -> tuple[int, int, int]:
    """(registers, bytes spilled, bytes of stack)."""
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    used = re.search(r"Used (\d+) registers", log)
    if frame is None or used is None:
        raise ValueError(f"ptxas says nothing of registers and spills (is TRITON_DUMP_PTXAS_LOG=1?): {log!r}")
    stack, stored, loaded = map(int, frame.groups())
    return int(used[1]), stored + loaded, stack


def read_amdgcn(text: str) -> tuple[int, int, int]:
    """(vector registers, registers spilled, bytes of stack)."""
    key = {name: int(value) for name, value in re.findall(r"\.(\w+):\s*(\d+)", text)}
    return key["vgpr_count"], key["vgpr_spill_count"] + key["sgpr_spill_count"], key["private_segment_fixed_size"]


def dot_rows(ttir: str) -> int:
    """Rows of the highest product of 16-bit values in Triton's own code."""
    return max(map(int, re.findall(r"tt\.dot .*: tensor<(\d+)x\d+x(?:bf16|f16)>", ttir)), default=0)


def broken_rules(found: Resources, name: str, chip: Chip, num_warps: int) -> list[str]:
    """The rules that a kernel breaks, with the way out."""
    table = f"Choose another tile in hf_moe/kernels/triton/tiles/{name}.json."
    broken = []
    if found.spilled or found.stack:
        broken.append(f"must keep its values in registers, spills {found.spilled}, stack {found.stack} bytes. {table}")
    if found.shared_memory > chip.shared_memory:
        rule = f"may use {chip.shared_memory} bytes of shared memory, needs {found.shared_memory}"
        broken.append(f"{rule}. {table}")
    if found.dot_rows:
        # a warp group of four multiplies 64 rows at once on Hopper and Blackwell
        wanted = chip.tensor_core if found.dot_rows >= 64 and num_warps >= 4 else chip.small
        if wanted not in found.instructions:
            broken.append(f"must multiply with {wanted} instructions, has {found.instructions or 'none'}. {table}")
        if chip.target.backend == "cuda" and "cp.async" not in found.instructions:
            broken.append(f"must load its operands with cp.async, has {found.instructions}. {table}")
    return broken
