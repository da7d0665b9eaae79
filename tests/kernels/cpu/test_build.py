"""Building the CPU kernels: reasons why not, errors with a way out, one build for many processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_moe.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def _forget():
    build.why_not.cache_clear()
    yield
    build.why_not.cache_clear()


def test_the_switch_turns_the_kernels_off(monkeypatch):
    monkeypatch.setenv("HF_MOE_CPU_KERNELS", "0")
    assert build.why_not() == "HF_MOE_CPU_KERNELS=0 turns the CPU kernels off: unset it to have them."
    build.load_kernels.cache_clear()
    with pytest.raises(RuntimeError, match="cannot be built: HF_MOE_CPU_KERNELS=0"):
        build.load_kernels()


def test_no_compiler_is_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.why_not() == ("no C++ compiler ('no-such-compiler' is not on the PATH): install g++ or set CXX.")


def test_no_ninja_is_a_reason(monkeypatch):
    which = build.shutil.which
    monkeypatch.setattr(build.shutil, "which", lambda name: None if name == "ninja" else which("true"))
    assert build.why_not() == "ninja is not on the PATH: pip install ninja."


def test_another_system_is_a_reason(monkeypatch):
    monkeypatch.setattr(build.sys, "platform", "win32")
    assert "built on Linux only, not on win32" in build.why_not()


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_a_failed_build_shows_the_compiler_and_the_way_out(monkeypatch, tmp_path):
    source = tmp_path / "broken.cpp"
    source.write_text("int main() { return undeclared_name; }\n")
    monkeypatch.setattr(build, "SOURCES", [source])
    monkeypatch.setattr(build, "HEADERS", [])
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    build.load_kernels.cache_clear()
    with pytest.raises(RuntimeError, match=r"(?s)undeclared_name.*HF_MOE_CPU_KERNELS=0 does without"):
        build.load_kernels()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_the_key_knows_flags_version_and_instruction_set(monkeypatch):
    keys = {build._key()}
    for name, value in (("FLAGS", ("-O1",)), ("_instruction_set", lambda: "flags: none"), ("SOURCES", [])):
        with monkeypatch.context() as patch:
            patch.setattr(build, name, value)
            keys.add(build._key())
    with monkeypatch.context() as patch:
        patch.setattr(build.torch, "__version__", "1.0")
        keys.add(build._key())
    assert len(keys) == 5


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_processes_that_start_together_build_once(tmp_path):
    code = """
import logging, sys
from pathlib import Path
logging.basicConfig(stream=sys.stdout, format="%(message)s")
from hf_moe.kernels.cpu import build
build.SOURCES = [Path(sys.argv[1])]
build.load_kernels()
"""
    source = tmp_path / "empty.cpp"
    source.write_text('extern "C" int nothing() { return 0; }\n')
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code, str(source)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("building hf_moe's CPU kernels" in out for out in outputs) == 1
