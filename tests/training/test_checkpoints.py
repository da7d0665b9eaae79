"""What an interruption leaves behind is either whole or known not to be."""

import json
from contextlib import suppress

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_moe.training.checkpoints import (
    MANIFEST,
    SealCheckpoints,
    is_sealed,
    newest_sealed,
    seal,
    whole_folder,
    write_json,
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


@pytest.mark.parametrize("damage", [truncate, flip, remove, no_manifest, half_manifest])
def test_a_damaged_checkpoint_is_passed_over(damage, tmp_path):
    old, new = checkpoint(tmp_path, 5), checkpoint(tmp_path, 10)
    damage(new)
    assert not is_sealed(new)
    assert newest_sealed(tmp_path) == str(old)
    assert not new.exists()
    assert (tmp_path / "unfinished-checkpoint-10").exists()
    # and again, over the leftovers of the first time
    damage(checkpoint(tmp_path, 10))
    assert newest_sealed(tmp_path) == str(old)


def test_a_limit_of_one_checkpoint_is_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), save_total_limit=1, report_to="none")
    with pytest.raises(ValueError, match="at least 2 with SealCheckpoints, got 1"):
        SealCheckpoints().on_train_begin(arguments, TrainerState(), TrainerControl())


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


def test_json_is_replaced_as_a_whole_and_never_nan(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"a": 0.1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 0.1}
