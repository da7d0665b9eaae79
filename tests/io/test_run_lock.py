"""One run at a time in a folder: the second is told of the first, and a killed one blocks nobody."""

import errno
import fcntl
import os
import signal
from contextlib import contextmanager, suppress

import pytest
from transformers import Trainer

from hf_moe.io import run_lock
from hf_moe.io.run_lock import LOCK, RunRefusedError, folder_held, frees_folders, hold_until_the_end
from hf_moe.io.stages import ResumableRun
from hf_moe.training.checkpointing.checkpoints import UNFINISHED
from hf_moe.training.checkpointing.safe_checkpoint import SafeCheckpointMixin
from safe_runs import SafeTrainer, arguments, make_trainer


@contextmanager
def another_run(folder):
    """A process that holds the folder until the block ends; its id."""
    (ready, tell), (wait, end) = os.pipe(), os.pipe()
    if (process := os.fork()) == 0:
        with folder_held(folder, "train.py"):
            os.close(end)
            os.write(tell, b"x")
            os.read(wait, 1)
        os._exit(0)
    os.read(ready, 1)
    try:
        yield process
    finally:
        os.close(end)
        with suppress(ChildProcessError):  # waited for already
            os.waitpid(process, 0)
        for descriptor in (ready, tell, wait):
            os.close(descriptor)


def is_free(folder) -> bool:
    try:
        with folder_held(folder):
            return True
    except RunRefusedError:
        return False


class PlainSafeTrainer(SafeCheckpointMixin, Trainer):
    pass


def stages(folder):
    ResumableRun(folder, "demo", {}).__enter__()


def recipe(folder):
    from hf_moe.finetuning.prepare import refuse_used_folder

    refuse_used_folder(arguments(folder, resume_from_checkpoint="auto"))


RUNS = {
    "MoeTrainer": lambda folder: make_trainer(folder, trainer_class=SafeTrainer).train(),
    "SafeCheckpointMixin": lambda folder: make_trainer(folder, trainer_class=PlainSafeTrainer).train(),
    "quickstart and evaluate": stages,
    "recipes": recipe,
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_second_run_is_refused_and_touches_nothing(kind, tmp_path):
    """It used to delete the checkpoint that the first was writing."""
    (tmp_path / UNFINISHED / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "demo.json").write_text('{"identity": {}, "begun": {}, "stages": {}}')
    with another_run(tmp_path) as first:
        words = rf"another run works in '{tmp_path}': train.py \(process {first} on .*, since .*\)\. Wait for it"
        with pytest.raises(RunRefusedError, match=words):
            RUNS[kind](tmp_path)
    assert (tmp_path / UNFINISHED / "checkpoint-2").is_dir()
    assert not (tmp_path / LOCK).exists()


def test_a_killed_run_blocks_nobody(tmp_path):
    with another_run(tmp_path) as first:
        assert not is_free(tmp_path)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        assert (tmp_path / LOCK).exists()
        assert is_free(tmp_path)


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    with folder_held(tmp_path):
        reading, writing = os.pipe()
        if (worker := os.fork()) == 0:
            os.read(reading, 1)
            os._exit(0)
        os.unlink(tmp_path / LOCK)  # as if killed: nothing is unlocked by hand
        descriptor = run_lock._held[tmp_path.resolve()]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert is_free(tmp_path)
    os.write(writing, b"x")
    os.waitpid(worker, 0)


def test_a_child_that_ends_leaves_the_lock_of_its_parent(tmp_path):
    with folder_held(tmp_path):
        if (child := os.fork()) == 0:
            run_lock._release(tmp_path.resolve())  # as its way out of the block does
            os._exit(0)
        os.waitpid(child, 0)
        assert not is_free(tmp_path)


def test_one_run_takes_part_in_what_it_holds(tmp_path):
    with folder_held(tmp_path):
        with folder_held(tmp_path, nested=True):
            assert not is_free(tmp_path)
        assert not is_free(tmp_path)
    assert is_free(tmp_path)


def test_a_recipe_frees_its_folder_when_it_ends(tmp_path):
    @frees_folders
    def main(error):
        hold_until_the_end(tmp_path)
        hold_until_the_end(tmp_path)
        assert not is_free(tmp_path)
        if error is not None:
            raise error

    main(None)
    assert is_free(tmp_path)
    with pytest.raises(ValueError, match="in the middle"):
        main(ValueError("in the middle"))
    assert is_free(tmp_path)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_no_lock_is_not_written_to(kind, tmp_path):
    (tmp_path / "theirs").write_text("kept")
    lock = tmp_path / LOCK
    {"link": lambda: lock.symlink_to("theirs"), "folder": lock.mkdir, "pipe": lambda: os.mkfifo(lock)}[kind]()
    with pytest.raises(RunRefusedError, match=r"_run\.lock' must be a file: it locks the folder"):
        folder_held(tmp_path).__enter__()
    assert (tmp_path / "theirs").read_text() == "kept"


def test_a_file_system_without_locks_is_logged(tmp_path, monkeypatch, caplog):
    def no_locks(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with folder_held(tmp_path):
        assert "cannot be locked (No locks available): start no second run in it" in caplog.text
