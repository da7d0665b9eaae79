"""Compile the C++ kernels once per machine, load them, or say why that cannot be.

What is there is used as it is (cache.py), also where nothing can be written and no compiler is; only then one is
needed. `python -m hf_moe.kernels.cpu` builds beforehand, for a container image.
"""

import functools
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Container
from pathlib import Path

import torch

from .cache import FLAGS, NATIVE, SOURCE, add_library, find_libraries, targets

logger = logging.getLogger(__name__)

SWITCH = "HF_MOE_CPU_KERNELS"
_QUOTED_LINES, _QUOTED_WIDTH = 2, 200  # of a compiler's errors


@functools.cache
def unavailable_reason() -> str | None:
    """Return why the kernels cannot run here, a sentence that ends with a way out; None if nothing speaks against it.

    Reads the environment once per process.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return f"{SWITCH}=0 turns the CPU kernels off: unset it to have them."
    if sys.platform != "linux":
        return f"the CPU kernels are built on Linux only, not on {sys.platform}: use transformers' 'grouped_mm'."
    try:
        targets()
    except OSError as error:
        return f"what this processor can do is not known ({error}): use transformers' 'grouped_mm'."
    return None if find_libraries() else _why_no_compiler()


def _why_no_compiler() -> str | None:
    try:
        command = _compiler()
    except ValueError as error:
        return f"CXX={os.environ['CXX']!r} is no command ({error}): set it to a C++ compiler, such as g++."
    if shutil.which(command[0]) is None:
        return f"no C++ compiler ({command[0]!r} is not on the PATH): install g++ or set CXX."
    try:
        subprocess.run([*command, "--version"], check=True, capture_output=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler does not run ({_short(str(error))}): install g++ or set CXX."
    return None


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


@functools.cache
def load_kernels() -> None:
    """Make `torch.ops.hf_moe_cpu` available, building it if this machine has not yet.

    Raises:
        RuntimeError: If the kernels cannot be built (`unavailable_reason`), the compiler failed (with its first
            errors), or what it made cannot be loaded.
    """
    if reason := unavailable_reason():
        raise RuntimeError(f"hf_moe's CPU kernels cannot be built: {reason}")
    useless = set()
    for library, digest in find_libraries():
        try:
            torch.ops.load_library(str(library))
        except OSError as error:  # made for another C library, or a folder that may not hold code
            logger.warning("hf_moe's CPU kernels are built again, because they cannot be loaded: %s", error)
            useless.add(digest)
        else:
            return
    library = build_library(NATIVE, useless)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise RuntimeError(
            f"hf_moe's CPU kernels were built but cannot be loaded ({_short(str(error))}): delete "
            f"{library.parent}, or do without with {SWITCH}=0."
        ) from error


def build_library(target: str, useless: Container[bytes] = ()) -> Path:
    """Compile the kernels for an instruction set, as `-march` takes it, unless that was done; returns the library.

    Args:
        useless: Digests of libraries that are there and do not count.

    Raises:
        RuntimeError: If there is no working compiler, it fails, or there is no place for the result.
    """
    if reason := _why_no_compiler():
        raise RuntimeError(f"hf_moe's CPU kernels cannot be built: {reason}")
    return add_library(target, functools.partial(_compile, target), useless)


def _compile(target: str, library: Path) -> None:
    """Compile and link, in the library's folder.

    Source: the commands of torch 2.13, `utils/cpp_extension.py`, for a library without Python.
    """
    logger.warning("building hf_moe's CPU kernels in %s: up to a minute, once per machine", library.parent.parent)
    start = time.perf_counter()
    torch_folder, compiled = Path(torch.__file__).parent, library.with_suffix(".o")
    include = torch_folder / "include"
    headers = [f"-isystem{folder}" for folder in (include, include / "torch" / "csrc" / "api" / "include")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    libraries = [f"-L{torch_folder / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    _run([*_compiler(), *FLAGS, f"-march={target}", abi, *headers, "-c", SOURCE, "-o", compiled])
    _run([*_compiler(), "-shared", compiled, *libraries, "-o", library])
    logger.warning("built hf_moe's CPU kernels in %.0f s", time.perf_counter() - start)


def _run(command: list[str | Path]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if result.returncode:
        raise RuntimeError(
            f"building hf_moe's CPU kernels with {command[0]!r} failed: {_first_errors(result.stderr)}. Another "
            f"compiler can be named with CXX (g++ 11 or newer); {SWITCH}=0 does without these kernels."
        )


def _first_errors(output: str) -> str:
    """The compiler's first errors, without the code that it shows below them, or its last words."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line][:_QUOTED_LINES] or lines[-_QUOTED_LINES:]
    return "; ".join(_short(line) for line in errors) or "no message"


def _short(text: str) -> str:
    return text if len(text) <= _QUOTED_WIDTH else f"{text[:_QUOTED_WIDTH]}..."
