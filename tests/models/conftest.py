"""Saved checkpoints that the tests of this folder share."""

import shutil
from pathlib import Path

import pytest
from spoilt_checkpoints import SHARD_SIZE, build


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model saved in one file and in shards: read only."""
    folder = tmp_path_factory.mktemp("saved")
    model = build()
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size=SHARD_SIZE)
    return {"single": folder / "single", "sharded": folder / "sharded"}


@pytest.fixture
def single(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["single"], tmp_path / "checkpoint"))


@pytest.fixture
def sharded(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["sharded"], tmp_path / "checkpoint"))
