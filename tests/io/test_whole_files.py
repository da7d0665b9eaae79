"""Files and folders that appear whole or not at all."""

import errno
import json
import os
import shutil
from contextlib import suppress

import pytest

from hf_moe.io.whole_files import remove_temporaries, whole_folder, write_json, write_text


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with suppress(KeyboardInterrupt), whole_folder(target) as folder:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt
    assert not target.exists()
    with whole_folder(target) as folder:
        assert not any(folder.iterdir())
        (folder / "weights").write_text("new")
    assert (target / "weights").read_text() == "new"
    with whole_folder(target) as folder:
        (folder / "other").write_text("newer")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["other"]


def test_what_cannot_be_written_leaves_nothing_half(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_json(tmp_path / "state.json", 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "state.json", 2)
    with pytest.raises(OSError, match="No space left"), whole_folder(tmp_path / "model") as folder:
        (folder / "weights").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert json.loads((tmp_path / "state.json").read_text()) == 1


def test_json_is_replaced_as_a_whole_and_never_nan(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"a": 0.1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 0.1}


def test_the_old_folder_goes_last(tmp_path, monkeypatch):
    """Also where it cannot be deleted: the new one is in its place."""
    target = tmp_path / "model"
    with whole_folder(target) as folder:
        (folder / "weights").write_text("old")

    def busy(path, *args, **kwargs):
        if not kwargs.get("ignore_errors"):
            raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", busy)
    with whole_folder(target) as folder:
        (folder / "weights").write_text("new")
    assert (target / "weights").read_text() == "new"


def test_a_file_is_not_replaced_by_a_folder(tmp_path):
    (tmp_path / "thesis").write_text("mine")
    with pytest.raises(NotADirectoryError), whole_folder(tmp_path / "thesis"):
        pass
    assert (tmp_path / "thesis").read_text() == "mine"


def test_what_a_kill_left_is_removed_and_what_it_displaced_put_back(tmp_path):
    """Killed between the two renames of `whole_folder`: neither folder is in its place."""
    for name in (
        ".best.hf_moe.tmp",
        ".best.hf_moe.old.tmp",
        ".tmpAbC123",
        ".kept.hf_moe.old.tmp",
        "kept",
        ".gitignore",
        ".tmp",
        "notes.tmp",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "best",
        "kept",
        ".tmpAbC123",
        ".gitignore",
        ".tmp",
        "notes.tmp",
    }
    assert (tmp_path / "best" / "x").read_text() == ".best.hf_moe.old.tmp"


@pytest.mark.parametrize("link", ["card.md", ".card.md.hf_moe.tmp"])
def test_no_link_is_written_through(tmp_path, link):
    (tmp_path / "theirs").write_text("kept")
    (tmp_path / link).symlink_to("theirs")
    write_text(tmp_path / "card.md", "new")
    assert (tmp_path / "theirs").read_text() == "kept"
    assert (tmp_path / "card.md").read_text() == "new"
