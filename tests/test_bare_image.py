"""The GPU tests where only torch, triton, transformers, peft and pytest are: no extras, hf_moe not installed.

It imports every test file, so that it runs in .ci/run alone.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BARE = """
import sys
from importlib.machinery import PathFinder

absent = set(sys.argv.pop(1).split(","))
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *at: None if name.split(".")[0] in absent else find(name, *at))
# an editable installation finds hf_moe.recipes, which the checkout alone does not hold
sys.meta_path[:] = [it for it in sys.meta_path if not getattr(it, "__module__", "").startswith("__editable__")]

import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""
ABSENT = (
    "datasets,evaluate,kingfisher_sdk,lm_eval,matplotlib,pandas,playwright,pyarrow,scipy,sklearn,starlette,tensorboard,"
    "trl,uvicorn"
)


@pytest.mark.long
def test_every_gpu_test_is_collected_without_extras_and_installation():
    """`python -m pytest -m gpu` from the root; what it selects is all in tests/kernels, but it imports every file."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    run = subprocess.run(
        [sys.executable, "-c", BARE, ABSENT, "--collect-only", "-q", "-m", "gpu", "--assert=plain", "-p", "no:xdist"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    tests = re.findall(r"^(tests/[\w/]+\.py)::", run.stdout, re.MULTILINE)
    assert len(tests) > 50
    assert all(file.startswith("tests/kernels/") for file in tests), "README's command for GPU tests names a folder"
