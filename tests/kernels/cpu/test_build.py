"""Building and finding the CPU kernels on machines as they are: a library that is whole is used, else built once."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_moe.kernels.cpu import __main__ as prebuild
from hf_moe.kernels.cpu import build, cache

ROOT = Path(__file__).resolve().parents[3]
NEEDS_COMPILER = pytest.mark.skipif(build._why_no_compiler() is not None, reason="needs a C++ compiler")
SMALL = 'extern "C" int nothing() { return 0; }\n'


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """Folders of this test alone, and a library that takes a moment to build; the place for libraries."""
    (tmp_path / "small.cpp").write_text(SMALL)
    for module in (build, cache):
        monkeypatch.setattr(module, "SOURCE", tmp_path / "small.cpp")
    monkeypatch.setattr(cache, "HEADERS", [])
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")
    monkeypatch.setenv(cache.PLACE, str(tmp_path / "place"))
    forget()
    yield tmp_path / "place"
    forget()


def forget():
    for function in (build.unavailable_reason, build.load_kernels):
        function.cache_clear()


def load() -> None:
    forget()
    build.load_kernels()


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("hf_moe_cpu_*.so"))


def built(folder: Path) -> Path:
    (library,) = libraries(folder)
    return library


def unwritable(folder: Path) -> str:
    """A path that cannot be made, also by root: its parent is a file."""
    folder.with_suffix(".file").touch()
    return str(folder.with_suffix(".file") / "below")


def test_the_switch_turns_the_kernels_off(monkeypatch):
    monkeypatch.setenv("HF_MOE_CPU_KERNELS", "0")
    assert build.unavailable_reason() == "HF_MOE_CPU_KERNELS=0 turns the CPU kernels off: unset it to have them."
    with pytest.raises(RuntimeError, match="cannot be built: HF_MOE_CPU_KERNELS=0"):
        build.load_kernels()


def test_another_system_is_a_reason(monkeypatch):
    monkeypatch.setattr(build.sys, "platform", "win32")
    assert "built on Linux only, not on win32" in build.unavailable_reason()


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no C++ compiler ('no-such-compiler' is not on the PATH): install g++ or set CXX."),
        ("/bin/false", "the C++ compiler does not run (Command '['/bin/false', '--version']' returned non-zero exit "),
        ("'c++", 'CXX="\'c++" is no command (No closing quotation): set it to a C++ compiler, such as g++.'),
    ],
)
def test_a_compiler_that_is_not_there_or_does_not_run_is_a_reason(monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    assert build.unavailable_reason().startswith(reason)
    with pytest.raises(RuntimeError, match="cannot be built: "):
        build.load_kernels()


def test_a_processor_that_is_not_known_is_a_reason(monkeypatch):
    def unreadable():
        raise PermissionError(13, "Permission denied", "/proc/cpuinfo")

    monkeypatch.setattr(cache, "_processor", unreadable)
    assert "'/proc/cpuinfo'): use transformers' 'grouped_mm'" in build.unavailable_reason()


@NEEDS_COMPILER
def test_a_compiler_with_arguments(monkeypatch, place):
    monkeypatch.setenv("CXX", "env c++ -g0")
    load()
    assert built(place)


@NEEDS_COMPILER
def test_a_failed_build_shows_the_first_errors_and_the_way_out(monkeypatch, tmp_path):
    name = "undeclared_" + 400 * "x"
    (tmp_path / "small.cpp").write_text(f"int f() {{ return {name}1; }}\n" + f"int g() {{ return {name}2; }}\n" * 50)
    with pytest.raises(RuntimeError, match=r"with 'c\+\+' failed: .*error: .*undeclared_x.*=0 does without") as caught:
        load()
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)
    assert not libraries(tmp_path)
    assert not list(tmp_path.rglob("work-*"))


@NEEDS_COMPILER
@pytest.mark.parametrize("home", ["unwritable", "unknown"])
def test_without_a_folder_that_can_be_written_the_temporary_one_is_taken(monkeypatch, tmp_path, caplog, home):
    monkeypatch.setenv(cache.PLACE, unwritable(tmp_path / "place"))
    monkeypatch.setenv("HOME", unwritable(tmp_path / "home"))
    if home == "unknown":
        monkeypatch.setattr(cache.os.path, "expanduser", lambda path: path)
    load()
    own = tmp_path / f"hf_moe-{os.getuid()}"
    assert own in built(tmp_path).parents
    assert own.stat().st_mode & 0o777 == 0o700
    assert "place.file/below: [Errno 20] Not a directory" in caplog.text
    assert f"building hf_moe's CPU kernels in {own}" in caplog.text
    caplog.clear()
    load()
    assert caplog.text == ""


@NEEDS_COMPILER
def test_a_temporary_folder_of_others_is_not_trusted(monkeypatch, tmp_path):
    monkeypatch.setenv(cache.PLACE, unwritable(tmp_path / "place"))
    monkeypatch.setenv("HOME", unwritable(tmp_path / "home"))
    own = tmp_path / f"hf_moe-{os.getuid()}"
    load()
    own.chmod(0o777)
    assert cache.find_libraries() == []
    with pytest.raises(RuntimeError, match=r"others may write to .*: name one with HF_MOE_CPU_CACHE"):
        load()


@NEEDS_COMPILER
def test_a_library_that_is_there_needs_neither_lock_nor_compiler(monkeypatch, place, caplog):
    """The container: built by root, used by someone who may only read."""
    load()
    lock = built(place).parent / "building"
    lock.unlink()
    lock.mkdir()  # opening it to write fails, also for root
    caplog.clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    load()
    assert build.unavailable_reason() is None
    assert caplog.text == ""


def cut(library: Path) -> None:
    library.write_bytes(library.read_bytes()[:-1000])


def flip(library: Path) -> None:
    content = bytearray(library.read_bytes())
    content[len(content) // 2] ^= 1
    library.write_bytes(content)


def garbage_that_looks_whole(library: Path) -> None:
    """Whole and unfit, as a library made for a newer C library is."""
    library.write_bytes(b"no library")
    cache._seal(library)


@NEEDS_COMPILER
@pytest.mark.parametrize("spoil", [cut, flip, garbage_that_looks_whole, lambda library: library.write_bytes(b"")])
def test_a_spoilt_library_is_built_again(place, spoil):
    library = build.build_library("native")
    size = library.stat().st_size
    spoil(library)
    load()
    assert library == built(place)
    assert cache._digest(library) is not None
    assert library.stat().st_size == size


@NEEDS_COMPILER
def test_a_new_library_that_cannot_be_loaded_is_an_error(monkeypatch, place, tmp_path):
    script = tmp_path / "bad-compiler"
    script.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo no library > "$2"; shift; done\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(RuntimeError, match=rf"but cannot be loaded \(.*\): delete {place}.*HF_MOE_CPU_KERNELS=0"):
        load()


def test_the_name_knows_all_that_a_library_is_made_of(monkeypatch):
    names = {cache.library_name(target) for target in ("native", "x86-64-v3", "x86-64-v4")}
    for where, name, value in (
        (cache, "FLAGS", ("-O1",)),
        (cache, "_processor", lambda: ["flags: none"]),
        (cache, "HEADERS", [cache.SOURCE]),
        (cache.torch, "__version__", "1.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            names.add(cache.library_name("native"))
    assert len(names) == 7


def test_a_level_is_run_by_processors_that_have_all_of_it_alone(monkeypatch):
    monkeypatch.setattr(cache.platform, "machine", lambda: "x86_64")
    for flags, expected in (
        (cache.LEVELS["x86-64-v4"], ["native", "x86-64-v4", "x86-64-v3"]),
        (cache.LEVELS["x86-64-v4"] - {"avx512dq"}, ["native", "x86-64-v3"]),
        (cache.LEVELS["x86-64-v3"] - {"fma"}, ["native"]),
    ):
        monkeypatch.setattr(cache, "_processor", lambda flags=flags: [f"flags\t\t: {' '.join(flags)}"])
        assert cache.targets() == expected


@NEEDS_COMPILER
def test_a_library_of_another_processor_is_not_loaded(monkeypatch, place, caplog):
    load()
    first = built(place)
    monkeypatch.setattr(cache, "_processor", lambda: ["flags\t\t: sse2"])
    assert cache.find_libraries() == []
    caplog.clear()
    load()
    assert len(libraries(place)) == 2
    assert f"building hf_moe's CPU kernels in {place}" in caplog.text
    assert first in libraries(place)


@NEEDS_COMPILER
@pytest.mark.skipif("x86-64-v3" not in cache.targets(), reason="needs an x86-64 processor of level 3")
def test_built_beforehand_for_other_processors(monkeypatch, place, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", "--target", "x86-64-v3"])
    prebuild.main()
    assert capsys.readouterr().out == f"x86-64-v3: {built(place)}\n"
    monkeypatch.setattr(cache, "_processor", lambda: [f"flags\t\t: {' '.join(cache.LEVELS['x86-64-v3'])}"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    load()
    with pytest.raises(SystemExit, match="cannot be built: no C"):
        prebuild.main()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv(cache.PLACE, unwritable(tmp_path / "other"))
    with pytest.raises(SystemExit, match=r"HF_MOE_CPU_CACHE=.* cannot be written"):
        prebuild.main()


@NEEDS_COMPILER
def test_a_file_system_without_locks(monkeypatch, place):
    def no_locks(file, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    load()
    assert built(place)


def start(source: Path, **environment: str) -> subprocess.Popen:
    code = """
import logging, sys
from pathlib import Path
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from hf_moe.kernels.cpu import build, cache
build.SOURCE = cache.SOURCE = Path(sys.argv[1])
cache.HEADERS = []
build.load_kernels()
"""
    command = [sys.executable, "-c", code, str(source)]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env={**os.environ, **environment}, **options)


@NEEDS_COMPILER
def test_processes_that_start_together_build_once_also_after_one_was_killed(place, tmp_path):
    slow = tmp_path / "slow-compiler"
    slow.write_text('#!/bin/sh\n[ "$1" = --version ] || exec sleep 600\n')
    slow.chmod(0o755)
    killed = start(tmp_path / "small.cpp", CXX=str(slow))
    while not list(place.rglob("work-*")):
        assert killed.poll() is None
        time.sleep(0.1)
    processes = [start(tmp_path / "small.cpp") for _ in range(2)]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    outputs = [process.communicate(timeout=250)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("building hf_moe's CPU kernels" in out for out in outputs) == 1
    assert sorted(path.name for path in built(place).parent.iterdir()) == ["building", built(place).name]
