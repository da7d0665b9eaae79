"""Find and place compiled libraries, those alone that this machine may load.

A library's name holds a hash of all that it was made of: sources, flags, torch's version and the instruction set, so
that machines that share a folder do not share instructions. Its last bytes are a digest of all others: a file that
was cut short is not loaded (the loader could end the process with SIGBUS), and one file that appears in one move needs
no lock to be read.
"""

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "library.cpp"
HEADERS = sorted(FOLDER.glob("*.h"))
# -fopenmp is for the compiler, not the linker: the symbols are to be those of the OpenMP library that torch brought
FLAGS = ("-std=c++20", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")

PLACE = "HF_MOE_CPU_CACHE"
NATIVE = "native"
# What a processor must have for the x86-64 levels of the psABI, in the words of /proc/cpuinfo; best first
_V2 = frozenset(["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"])
_V3 = _V2 | frozenset(["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
LEVELS = {"x86-64-v4": _V4, "x86-64-v3": _V3}

_SEAL = b"hf_moe sha256 "


def targets() -> list[str]:
    """Instruction sets, as `-march` takes them, that this processor has; the one of the processor itself first."""
    flags: set[str] = set()
    if platform.machine() == "x86_64":
        flags.update(word for line in _processor() if line.startswith("flags") for word in line.split())
    return [NATIVE, *(level for level, needed in LEVELS.items() if needed <= flags)]


@functools.cache
def _processor() -> list[str]:
    """Lines of /proc/cpuinfo that `-march=native` depends on: model and features of every kind of core."""
    wanted = ("vendor_id", "cpu family", "model", "flags", "features", "cpu part", "cpu variant", "cpu implementer")
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return sorted({line for line in lines if line.lower().startswith(wanted)})


def library_name(target: str) -> str:
    parts = [path.read_text() for path in (SOURCE, *HEADERS)]
    parts += [*FLAGS, torch.__version__, platform.machine(), target]
    if target == NATIVE:
        parts += _processor()
    return f"hf_moe_cpu_{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def find_libraries() -> list[tuple[Path, bytes]]:
    """Whole libraries that this machine can run, best first, with their digests; nothing is locked or written."""
    roots = [*_chosen_roots(), *([_own_root()] if _is_private(_own_root()) else [])]
    names = [library_name(target) for target in targets()]
    paths = [root / name / f"{name}.so" for name in names for root in roots]
    return [(path, digest) for path in paths if (digest := _digest(path)) is not None]


def _chosen_roots() -> list[Path]:
    """The folder that the user names for our libraries, and torch's for extensions."""
    roots = [Path(chosen) for name in (PLACE, "TORCH_EXTENSIONS_DIR") if (chosen := os.environ.get(name))]
    home = os.path.expanduser("~")  # stays "~" for a user whom the system does not know
    if not os.environ.get("TORCH_EXTENSIONS_DIR") and home != "~":
        roots.append(Path(home) / ".cache" / "torch_extensions")
    return roots


def _own_root() -> Path:
    """For machines where the user's folders cannot be written; gone with the next boot."""
    return Path(tempfile.gettempdir()) / f"hf_moe-{os.getuid()}"


def _is_private(folder: Path) -> bool:
    """True if nobody else can have put a library there."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077


def _digest(path: Path) -> bytes | None:
    """Of a library that `seal` finished and nothing has changed since; None for everything else."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    body, seal, digest = content.rpartition(_SEAL)
    return digest if seal and hashlib.sha256(body).digest() == digest else None


def _seal(library: Path) -> None:
    with library.open("r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(_SEAL + digest)


def add_library(target: str, build: Callable[[Path], None], useless: Container[bytes]) -> Path:
    """The path of the library for `target`: built, or one that another process built meanwhile.

    Args:
        build: Makes the file whose path it gets.
        useless: Digests of libraries that do not count.

    Raises:
        RuntimeError: If `build` fails, or no folder can be written; says what was tried.
    """
    failed = []
    for root in (*_chosen_roots(), _own_root()):
        try:
            if root == _own_root():
                root.mkdir(mode=0o700, exist_ok=True)
                if not _is_private(root):
                    raise PermissionError(f"others may write to {root}")
            return _add(library_name(target), root, build, useless)
        except OSError as error:
            failed.append(str(error))
            logger.warning("hf_moe's CPU kernels cannot be built in %s: %s.", root, error)
    raise RuntimeError(
        f"no folder for hf_moe's CPU kernels can be written ({'; '.join(failed)}): name one with {PLACE}, or build "
        "them there beforehand with `python -m hf_moe.kernels.cpu`."
    )


def _add(name: str, root: Path, build: Callable[[Path], None], useless: Container[bytes]) -> Path:
    """Build in a folder of its own and move the result, so that a killed build leaves nothing that looks whole."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}.so"
    with _lock(folder / "building") as is_alone:
        if (digest := _digest(library)) is not None and digest not in useless:
            return library
        for left in folder.glob("work-*") if is_alone else ():
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="work-", dir=folder, ignore_cleanup_errors=True) as work:
            made = Path(work) / library.name
            build(made)
            _seal(made)
            os.replace(made, library)
    return library


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """One process builds, the others wait; the lock of a process that dies is free.

    Yields whether it was taken: some network file systems have no locks, and a second build only costs its time.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
