"""Kernels run compiled on a machine with a CUDA device, in Triton's interpreter elsewhere; TRITON_INTERPRET overrides.

The same tests serve both: they take the fixture `device`. A test marked `gpu` needs compiled kernels (graph capture,
large sizes) and is skipped in the interpreter; one that takes the fixture `interpreter` is skipped on a GPU. The
switch itself is set by tests/conftest.py, before anything imports triton, in every worker process.
"""

import importlib.util

import pytest

import triton_interpreter

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and triton_interpreter.is_on():
    triton_interpreter.repair()


@pytest.fixture
def device():
    return triton_interpreter.device()


@pytest.fixture
def interpreter():
    """The interpreter's methods before the repair, by name."""
    if not triton_interpreter.is_on():
        pytest.skip("kernels run compiled here: TRITON_INTERPRET=1 interprets them")
    return triton_interpreter.repair()


class WithoutTriton(pytest.Module):
    def collect(self):
        pytest.skip("needs triton: pip install hf-moe[triton]", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    if not HAS_TRITON and "import triton" in module_path.read_text():
        return WithoutTriton.from_parent(parent, path=module_path)
    return None


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and triton_interpreter.is_on():
            item.add_marker(pytest.mark.skip(reason="needs compiled kernels, TRITON_INTERPRET is set"))
