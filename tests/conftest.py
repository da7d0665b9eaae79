"""One place for what every test relies on: no network, fixed threads and seeds, uninitialised memory that shows."""

import atexit
import os
import shutil
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def _isolate() -> None:
    """Set what transformers, datasets and torch read while they are imported; worker processes inherit it."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "HF_MOE_TEST_HOME" not in os.environ:  # remote code and data sets are cached here, not in the user's home
        home = tempfile.mkdtemp(prefix="hf_moe_test_")
        os.environ.update(HF_MOE_TEST_HOME=home, HF_HOME=home)
        atexit.register(shutil.rmtree, home, ignore_errors=True)


_isolate()

import pytest  # noqa: E402
import torch  # noqa: E402
from packaging.specifiers import SpecifierSet  # noqa: E402

import triton_interpreter  # noqa: E402

triton_interpreter.switch_on_without_gpu()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.use_deterministic_algorithms(True, warn_only=True)
# torch.empty is full of NaN: a value that is read before it is written cannot pass
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def _upstream_changes() -> dict[str, str]:
    """Tests that the installed libraries break, and how (`upstream_changes.toml`)."""
    changes = tomllib.loads(Path(__file__).with_name("upstream_changes.toml").read_text())["change"]
    return {
        change["test"]: f"{change['date']}: {change['cause']}"
        for change in changes
        if all(_is_installed(name, wanted) for name, wanted in change["when"].items())
    }


def _is_installed(name: str, versions: str) -> bool:
    try:
        return SpecifierSet(versions).contains(version(name))
    except PackageNotFoundError:
        return False


def pytest_collection_modifyitems(items):
    broken = _upstream_changes()
    for item in items:
        if item.nodeid.split("[")[0] in broken:
            item.add_marker(pytest.mark.xfail(reason=broken[item.nodeid.split("[")[0]], strict=True))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
