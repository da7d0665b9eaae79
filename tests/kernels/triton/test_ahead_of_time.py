"""The checks of benchmarks/ahead_of_time.py: what is shipped passes, what spills does not, no kernel escapes.

They run in processes of their own: where the interpreter is on, nothing compiles. All shipped kernels, and the long
tests here, are stages of .ci/run.
"""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def check(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/ahead_of_time.py", "--workers", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_shipped_kernel_passes_and_its_needs_are_written(tmp_path):
    chosen = ("--chip", "sm_80", "--chip", "gfx942", "--kernel", "combine", "--kernel", "bias_gradient")
    done = check(*chosen, "--output", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "out.json").read_text())
    assert {row["chip"] for row in result["kernels"]} == {"sm_80", "gfx942"}
    assert {row["kernel"] for row in result["kernels"]} == {"sum_k_kernel", "bias_gradient_kernel"}
    assert all(row["registers"] > 0 and row["programs"] > 0 and not row["spilled"] for row in result["kernels"])
    assert "triton" in result["versions"]


@pytest.mark.long
def test_a_tile_that_spills_is_refused_with_its_name():
    """Two accumulators of 128 x 128 need more registers than an A100's threads have."""
    done = check("--chip", "sm_80", "--kernel", "up", "--features", "training", "--tile", "128,128,64,8,3")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "sm_80 up (training, bfloat16) up_kernel 128x128x64, 8 warps, 3 stages" in done.stderr
    assert "must keep its values in registers" in done.stderr
    assert "hf_moe/kernels/triton/tiles/sm_80.json" in done.stderr


@pytest.mark.long
def test_a_tile_larger_than_shared_memory_is_refused():
    done = check("--chip", "sm_120", "--kernel", "up", "--features", "inference", "--tile", "64,128,64,8,5")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "may use 101376 bytes of shared memory" in done.stderr


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({}, None),
        ({"spilled": 8}, "must keep its values in registers, spills 8"),
        ({"stack": 16}, "must keep its values in registers, spills 0, stack 16"),
        ({"shared_memory": 101377}, "may use 101376 bytes of shared memory, needs 101377"),
        ({"instructions": {"cp.async": 4}}, "must multiply with mma instructions"),
        ({"instructions": {"mma": 4}}, "must load its operands with cp.async"),
    ],
)
def test_a_broken_rule_names_the_table_of_the_chip(change, rule):
    """What `broken_rules` says of a compiled kernel; the long tests above compile such kernels."""
    from benchmarks.kernel_checks.compilation import CHIPS, Resources, broken_rules

    fits = Resources(128, 0, 0, 101376, {"mma": 4, "cp.async": 4}, 128, "mma m16n8k16", 1)
    broken = broken_rules(replace(fits, **change), "sm_120", CHIPS["sm_120"], 8)
    assert [rule in text and text.endswith("triton/tiles/sm_120.json.") for text in broken] == [True] * bool(rule)


PTX = """
ld.param.b64 %rd1, [decode_down_kernel_param_0];
ld.param.b64 %rd2, [decode_down_kernel_param_1];
@%p1 ld.global.b64 { %rd3 }, [ %rd2 + 0 ];
add.s64 %rd4, %rd1, 64;
griddepcontrol.wait; // dummy %r1
cp.async.cg.shared.global [ %r2 + 0 ], [ %rd4 + 0 ], 0x10, %r3;
"""


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("", ""), None),
        (("griddepcontrol.wait", "nop"), "must execute griddepcontrol.wait, on every path"),
        (("griddepcontrol.wait", "@%p1 griddepcontrol.wait"), "must execute griddepcontrol.wait, on every path"),
        (("add.s64", "@%p1 bra $L1;\nadd.s64"), "must execute griddepcontrol.wait, on every path"),
        (("[ %rd2 + 0 ]", "[ %rd1 + 0 ]"), r"before it reads act, found \['ld.global.b64 { %rd3 }, \[ %rd1"),
        (("griddep", "cp.async.cg.shared.global [ %r2 ], [ %rd4 ], 0x10;\ngriddep"), "before it reads act, found"),
    ],
)
def test_a_kernel_that_starts_early_waits_before_it_reads_what_is_written_meanwhile(change, error):
    from benchmarks.kernel_checks.dependent_launch import require_wait
    from benchmarks.kernel_checks.launches import Launch

    signature = (("act", "*fp32"), ("index", "*i64"), ("TOP_K", "constexpr"))
    launch = Launch("decode", "decode_down_kernel", signature, (), (), (("launch_pdl", True),))
    with pytest.raises(ValueError, match=error) if error else nullcontext():
        require_wait(launch, PTX.replace(*change, 1))


def test_every_kernel_is_launched_by_a_case():
    done = check("--coverage")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_interpreter_is_refused():
    command = [sys.executable, "benchmarks/ahead_of_time.py"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "unset it" in done.stderr
