"""What an interruption leaves behind is either whole or known not to be."""

import errno
import json
import os
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_moe.training.checkpointing.checkpoints import (
    MANIFEST,
    SealCheckpoints,
    clean_up,
    delete_old_checkpoints,
    flaw,
    newest_sealed,
    seal,
    seal_additions,
    sealed_bytes,
    write_failure,
)

FILES = {"model.safetensors": b"weights", "optimizer.pt": b"state" * 99, "sub/extra.json": b"{}"}


def checkpoint(root, step, sealed=True):
    folder = root / f"checkpoint-{step}"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if sealed:
        seal(folder)
    return folder


def test_the_newest_sealed_checkpoint_is_found_by_number(tmp_path):
    for step in (9, 10, 100):
        checkpoint(tmp_path, step)
    assert newest_sealed(tmp_path) == str(tmp_path / "checkpoint-100")


def test_nothing_to_resume_from(tmp_path):
    assert newest_sealed(tmp_path / "absent") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert newest_sealed(tmp_path) is None
    assert (tmp_path / "checkpoint-best").exists()


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"weig")


def flip(folder):
    (folder / "optimizer.pt").write_bytes(b"State" + b"state" * 98)


def remove(folder):
    (folder / "sub" / "extra.json").unlink()


def no_manifest(folder):
    (folder / MANIFEST).unlink()


def half_manifest(folder):
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text[: len(text) // 2])


def other_manifest(text):
    return lambda folder: (folder / MANIFEST).write_text(text)


DAMAGES = {
    "truncated": (truncate, "model.safetensors has 4 bytes instead of 7"),
    "flipped": (flip, r"optimizer.pt has changed since it was saved \(SHA-256 differs\)"),
    "removed": (remove, "sub/extra.json is missing"),
    "no_manifest": (no_manifest, "it has no manifest.json: it was never finished, or another program wrote it"),
    "half_manifest": (half_manifest, "its manifest.json cannot be read"),
    "empty_manifest": (other_manifest("{}"), "lists no files"),
    "list_manifest": (other_manifest("[1]"), "lists no files"),
    "wrong_entry": (other_manifest('{"a": 3}'), "the entry of 'a' is no size and hash"),
    "outside": (other_manifest('{"../x": [1, "0"]}'), "'../x' lies outside of the checkpoint"),
    "other_spelling": (other_manifest('{"./model.safetensors": [7, "0"]}'), "./model.safetensors has changed"),
    "deep": (other_manifest("[" * 100_000), "nested deeper than 64 levels"),
    "no_name": (other_manifest('{"a\\u0000b": [1, "0"]}'), "lies outside of the checkpoint"),
    "no_file": (other_manifest('{"sub": [4096, "0"]}'), "sub is no file"),
    "absolute": (other_manifest('{"/etc/passwd": [1, "0"]}'), "'/etc/passwd' lies outside"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(case, tmp_path, caplog):
    damage, reason = DAMAGES[case]
    old, new = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    damage(new)
    assert re.search(reason, flaw(new))
    assert newest_sealed(tmp_path) == str(old)
    assert re.search(f"Skipped .*checkpoint-10', which is now '_skipped-checkpoint-10': .*{reason}", caplog.text)
    assert not new.exists()
    assert (tmp_path / "_skipped-checkpoint-10").exists()
    # and again, over the leftovers of the first time
    damage(checkpoint(tmp_path, 10))
    assert newest_sealed(tmp_path) == str(old)


def test_odd_names_are_skipped_with_a_word(tmp_path, caplog):
    """Each used to be resumed from, or to end the resume in an error."""
    good = checkpoint(tmp_path, 9)
    shutil.copytree(good, tmp_path / "checkpoint-٧٠")
    (tmp_path / "checkpoint-80").write_text("a file")
    bad = checkpoint(tmp_path, 10)
    truncate(bad)
    (tmp_path / "_skipped-checkpoint-10").write_text("somebody's notes")
    assert newest_sealed(tmp_path) == str(good)
    assert "checkpoint-٧٠', which is no checkpoint: its number is not written in the digits 0 to 9" in caplog.text
    assert "checkpoint-80', which is no checkpoint: it is no folder" in caplog.text
    assert "which is now '_skipped-checkpoint-10-2'" in caplog.text
    assert (tmp_path / "_skipped-checkpoint-10").read_text() == "somebody's notes"
    clean_up(tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_old_checkpoints_that_are_links_stay(tmp_path):
    kept = checkpoint(tmp_path / "elsewhere", 2)
    (tmp_path / "checkpoint-2").symlink_to(kept)
    new = [checkpoint(tmp_path, step) for step in (4, 6)]
    delete_old_checkpoints(tmp_path, 1, {new[1]})
    assert flaw(tmp_path / "checkpoint-2") is None
    assert not new[0].exists()


def test_files_that_came_later_are_added_to_the_manifest(tmp_path):
    folder = checkpoint(tmp_path, 5)
    before = json.loads((folder / MANIFEST).read_text())
    seal_additions(folder)
    assert json.loads((folder / MANIFEST).read_text()) == before
    (folder / "late.json").write_text("late")
    (folder / "model.safetensors").write_bytes(b"other weights")
    os.utime(folder / "model.safetensors", ns=(1 << 62, 1 << 62))
    assert flaw(folder) == "model.safetensors has 13 bytes instead of 7"
    seal_additions(folder)
    assert flaw(folder) is None
    assert json.loads((folder / MANIFEST).read_text()).keys() == {*before, "late.json"}
    # within the same tick of a coarse clock
    (folder / "late.json").write_text("LATE")
    sealed_at = (folder / MANIFEST).stat().st_mtime_ns
    os.utime(folder / "late.json", ns=(sealed_at, sealed_at))
    seal_additions(folder)
    assert flaw(folder) is None
    assert sealed_bytes(folder) == sum(
        path.stat().st_size for path in folder.rglob("*") if path.name != MANIFEST and path.is_file()
    )


def test_the_oldest_go_first_and_never_those_to_keep(tmp_path):
    """Number 100 is of an earlier run in the folder."""
    folders = [checkpoint(tmp_path, step) for step in (100, 2, 4, 6)]
    for at, folder in enumerate(folders):
        os.utime(folder, ns=(at, at))
    delete_old_checkpoints(tmp_path, None, {folders[3]})
    assert len(list(tmp_path.iterdir())) == 4
    delete_old_checkpoints(tmp_path, 3, {folders[3]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    delete_old_checkpoints(tmp_path, 1, {folders[3], folders[1]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]


def test_an_old_one_that_cannot_be_deleted_is_reported_and_no_longer_valid(tmp_path, monkeypatch, caplog):
    folders = [checkpoint(tmp_path, step) for step in (2, 4)]

    def busy(path):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", busy)
    delete_old_checkpoints(tmp_path, 1, {folders[1]})
    assert "checkpoint-2' could not be deleted: [Errno 16] Device or resource busy" in caplog.text
    assert flaw(folders[0]) is not None
    assert flaw(folders[1]) is None


def test_temporary_files_of_a_killed_writer_do_not_stay(tmp_path):
    folder = checkpoint(tmp_path, 5, sealed=False)
    for orphan in (".tmpAbC123", ".manifest.json.hf_moe.tmp"):
        (folder / orphan).write_text("half")
    seal(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    mine = {".gitignore", ".tmp", "notes.tmp", ".notes.tmp", ".tmpbackup"}
    for kept in mine:
        (tmp_path / kept).write_text("mine")
    (tmp_path / ".x.hf_moe.tmp").symlink_to(folder)
    (tmp_path / ".report.json.hf_moe.tmp").write_text("half")
    clean_up(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*mine, ".x.hf_moe.tmp", "checkpoint-5"}
    assert flaw(folder) is None
    clean_up(tmp_path / "absent")


def torch_error(tmp_path):
    torch.save(torch.zeros(10**5), "/dev/full")


def torch_no_folder(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "absent" / "x")


def safetensors_no_folder(tmp_path):
    save_file({"x": torch.zeros(3)}, tmp_path / "absent" / "x")


def python_error(tmp_path):
    (tmp_path / "absent" / "x").write_text("x")


ERRORS = {
    "torch_full": (torch_error, "No space left on device, or no permission .torch says"),
    "torch_no_folder": (torch_no_folder, None),
    "safetensors": (safetensors_no_folder, "No such file or directory"),
    "python": (python_error, "No such file or directory"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_real_write_errors_are_understood(case, tmp_path):
    """The libraries' own errors, as the installed versions raise them."""
    work, reason = ERRORS[case]
    with pytest.raises((OSError, RuntimeError, SafetensorError)) as found:
        work(tmp_path)
    assert reason is None or re.search(reason, write_failure(found.value))


def test_other_errors_are_no_write_errors():
    assert write_failure(RuntimeError("CUDA out of memory")) is None
    assert write_failure(OSError(errno.EDQUOT, "x")) == "Disk quota exceeded"


def test_a_limit_of_one_checkpoint_is_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), save_total_limit=1, report_to="none")
    with pytest.raises(ValueError, match="at least 2 where checkpoints are sealed in place, got 1"):
        SealCheckpoints().on_train_begin(arguments, TrainerState(), TrainerControl())
