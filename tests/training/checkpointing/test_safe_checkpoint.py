"""Checkpoints of the mixin: they appear whole, resuming is exact to the bit, and failures keep the last one."""

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hf_moe.training.callbacks import RouterFreezeCallback
from hf_moe.training.checkpointing import safe_checkpoint
from hf_moe.training.checkpointing.checkpoints import MANIFEST, UNFINISHED, CheckpointError, flaw, seal, sealed_bytes
from hf_moe.training.checkpointing.resumption import is_resumable
from hf_moe.training.checkpointing.safe_checkpoint import state_bytes
from hf_moe.training.checkpointing.termination import EXIT_CODE, Terminated, sigterm_held
from safe_runs import ROWS, STEPS, SafeTrainer, assert_same, make_trainer, state, train
from tiny_moe import hf_moe_model, with_expert_lora
from torchrun import torchrun


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run: its folder, its trainer and its state. Of three checkpoints it keeps two."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = train(folder, save_total_limit=2)
    return folder, trainer, state(trainer)


class At(TrainerCallback):
    """Do something at the end of a step, or when a step was saved."""

    def __init__(self, step, work, event="step_end"):
        def act(args, state, control, **kwargs):
            if state.global_step == step:
                work()

        setattr(self, f"on_{event}", act)


def interrupt():
    raise KeyboardInterrupt


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


# ---- what is written


def test_checkpoints_are_valid_and_old_ones_deleted(whole):
    folder, trainer, _ = whole
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-4", "checkpoint-6"]
    assert [flaw(path) for path in folder.iterdir()] == [None, None]
    assert trainer.last_checkpoint == str(folder / "checkpoint-6")


def test_the_next_checkpoint_needs_what_the_estimate_says(whole):
    folder, trainer, _ = whole
    estimate = state_bytes(trainer.model, trainer.optimizer)
    assert 0.7 < estimate / sealed_bytes(folder / "checkpoint-6") < 1  # beside it: names, JSON, random states
    adapter = with_expert_lora(hf_moe_model())
    trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert state_bytes(adapter, None) == 4 * trained


def test_one_checkpoint_is_enough_as_the_old_goes_last(tmp_path, monkeypatch):
    seen = []
    delete = safe_checkpoint.delete_old_checkpoints

    def spy(*args):
        seen.append({path.name: flaw(path) for path in tmp_path.glob("checkpoint-*")})
        delete(*args)

    monkeypatch.setattr(safe_checkpoint, "delete_old_checkpoints", spy)
    train(tmp_path, max_steps=4)
    assert seen == [{"checkpoint-2": None}, {"checkpoint-2": None, "checkpoint-4": None}]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_what_callbacks_write_into_it_is_sealed_too(tmp_path):
    model = with_expert_lora(hf_moe_model())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    train(tmp_path, model=model, callbacks=[RouterFreezeCallback()], max_steps=2)
    manifest = json.loads((tmp_path / "checkpoint-2" / MANIFEST).read_text())
    assert "router_hash.json" in manifest
    assert flaw(tmp_path / "checkpoint-2") is None


def test_the_best_checkpoint_is_named_where_it_ends_up(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=0.0,
        save_total_limit=2,
    )
    trainer.train()  # the loss stays as it is: the first is the best, and is kept beside the newest
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-6"]
    written = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert written["best_model_checkpoint"] == str(tmp_path / "checkpoint-2")


def test_the_best_is_found_where_the_run_was_moved_to(tmp_path):
    settings = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "learning_rate": 0.0,
        "save_total_limit": 1,
        "max_steps": 4,
    }
    train(tmp_path / "a", **{**settings, "max_steps": 2})
    (tmp_path / "a").rename(tmp_path / "b")
    trainer = train(tmp_path / "b", resume=True, **settings)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "b" / "checkpoint-2")


def test_weights_alone_need_less_room(tmp_path):
    """What lies in the folder is no measure if it cannot be read."""
    trainer = train(tmp_path, max_steps=2)
    whole = trainer._needed_bytes(tmp_path)
    (tmp_path / "checkpoint-2" / MANIFEST).write_text("{")
    trainer.args.save_only_model = True
    assert trainer._needed_bytes(tmp_path) == state_bytes(trainer.model, None) < whole / 2


def test_in_place_the_manifest_alone_marks_what_is_complete(tmp_path):
    class InPlace(SafeTrainer):
        checkpoint_rename = False

    with pytest.raises(ValueError, match="save_total_limit must be at least 2 where checkpoints are sealed in place"):
        train(tmp_path, trainer_class=InPlace)
    train(tmp_path, trainer_class=InPlace, save_total_limit=2, max_steps=2)
    assert flaw(tmp_path / "checkpoint-2") is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_push_sees_the_checkpoint_in_its_place(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        "transformers.Trainer._push_from_checkpoint",
        lambda self, folder: pushed.append((folder, flaw(tmp_path / "checkpoint-2"))),
    )
    train(tmp_path, max_steps=2, push_to_hub=True)
    assert pushed == [(str(tmp_path / "checkpoint-2"), None)]


# ---- resume


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_exact(workers, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, callbacks=[At(5, interrupt)], dataloader_num_workers=workers)
    resumed = train(tmp_path, resume=True, dataloader_num_workers=workers)
    assert resumed.began == 4
    assert_same(state(resumed), whole[2])


def test_after_the_last_step_nothing_is_trained(whole):
    """The Trainer would take one more step."""
    folder, _, expected = whole
    again = train(folder, resume=True, save_total_limit=2)
    assert again.state.global_step == STEPS
    assert_same(state(again), expected)


def test_auto_starts_from_the_beginning_where_there_is_nothing(tmp_path, caplog):
    with pytest.raises(ValueError, match="no valid checkpoint in"):
        train(tmp_path, resume=True)
    with pytest.raises(CheckpointError, match="no such folder"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert train(tmp_path, resume="auto", max_steps=2).began == 0
    assert train(tmp_path, resume="auto", max_steps=4).began == 2
    assert "starting from the beginning" not in caplog.text
    (tmp_path / "checkpoint-4" / MANIFEST).unlink()
    assert train(tmp_path, resume="auto", max_steps=2).began == 0
    assert f"No valid checkpoint in {str(tmp_path)!r}: starting from the beginning" in caplog.text


def test_a_damaged_checkpoint_is_skipped_with_its_reason(tmp_path, caplog):
    train(tmp_path, save_total_limit=2, max_steps=4)
    weights = tmp_path / "checkpoint-4" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"checkpoint-4': model.safetensors has changed since it was saved"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    caplog.clear()
    resumed = train(tmp_path, resume=True, max_steps=4)
    assert resumed.began == 2
    assert "checkpoint-4', which is now '_skipped-checkpoint-4': model.safetensors has changed" in caplog.text
    assert f"Resuming from '{tmp_path / 'checkpoint-2'}'" in caplog.text


def test_a_checkpoint_of_another_program_is_used_if_named(tmp_path, caplog):
    train(tmp_path, max_steps=2)
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-2"), max_steps=4)
    assert resumed.began == 2
    assert "has no manifest.json: whether it is whole cannot be checked" in caplog.text


def test_what_a_killed_run_left_is_cleaned_or_finished(tmp_path):
    train(tmp_path, max_steps=4)
    (tmp_path / UNFINISHED).mkdir()
    os.rename(tmp_path / "checkpoint-4", tmp_path / UNFINISHED / "checkpoint-4")  # killed before its rename
    (tmp_path / UNFINISHED / "checkpoint-6").mkdir()
    (tmp_path / UNFINISHED / "checkpoint-6" / ".tmpAbC123").write_text("half")
    (tmp_path / ".notes.tmp").write_text("mine")
    (tmp_path / ".adapter.hf_moe.tmp").mkdir()
    resumed = train(tmp_path, resume=True, max_steps=4)
    assert resumed.began == 4
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4", ".notes.tmp"}


# ---- SIGTERM


@pytest.mark.parametrize("event", ["step_begin", "step_end", "substep_end"])
def test_sigterm_saves_and_resumes_exactly(event, whole, tmp_path):
    step = 2 if event != "step_end" else 3
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated) as stopped:
        train(tmp_path, callbacks=[At(step, sigterm, event)])
    assert stopped.value.code == EXIT_CODE == 75
    assert stopped.value.checkpoint == str(tmp_path / "checkpoint-3")
    assert signal.getsignal(signal.SIGTERM) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["RESUMABLE", "checkpoint-3"]
    assert (tmp_path / "RESUMABLE").read_text() == "checkpoint-3\n"
    resumed = train(tmp_path, resume=True)
    assert not (tmp_path / "RESUMABLE").exists()
    assert resumed.began == 3
    assert_same(state(resumed), whole[2])


def test_a_file_of_that_name_that_is_not_ours_stays(tmp_path):
    (tmp_path / "RESUMABLE").write_text("my notes")
    train(tmp_path, max_steps=1)
    assert (tmp_path / "RESUMABLE").read_text() == "my notes"


def test_what_weights_alone_lose_is_logged_at_the_start(tmp_path, caplog):
    train(tmp_path, max_steps=2, save_only_model=True)
    assert "save_only_model: a run that is resumed from a checkpoint of this one begins with a new opt" in caplog.text
    caplog.clear()
    train(tmp_path, resume=True, max_steps=3)
    assert (
        "checkpoint-2' holds the weights alone: this run continues at its step, but begins with a new" in caplog.text
    )
    caplog.clear()
    train(tmp_path, resume=True, max_steps=4)
    assert "weights alone" not in caplog.text


@pytest.mark.parametrize("trained_by", ["is_fsdp_enabled", "is_distributed_loading_by_transformers"])
def test_what_cannot_be_resumed_is_refused_by_all_processes_at_the_start(trained_by, tmp_path):
    """One process of FSDP raised FileNotFoundError, others waited for it; DistributedConfig failed in `copy_`."""
    trainer = train(tmp_path, max_steps=2, save_only_model=True)
    setattr(trainer, trained_by, True)
    assert not is_resumable(trainer)
    with pytest.raises(CheckpointError, match=r"cannot resume from .*checkpoint-2'.*\. Load the model from it with"):
        trainer.train(resume_from_checkpoint="auto")


def test_sigterm_at_a_step_that_is_saved_anyway_saves_once(tmp_path):
    saves = []
    with pytest.raises(Terminated):
        train(tmp_path, callbacks=[At(2, sigterm), At(2, lambda: saves.append(1), "save")])
    assert saves == [1]
    assert flaw(tmp_path / "checkpoint-2") is None


EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 4}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    return train(tmp_path_factory.mktemp("evaluated"), **EVALUATED)


@pytest.mark.parametrize("step", [2, 4])
def test_sigterm_breaks_an_evaluation_off_and_it_is_made_up_for(step, evaluated, tmp_path):
    """Also that of the last step; the best model is that of the whole run."""
    batches = []
    with pytest.raises(Terminated) as stopped:
        train(
            tmp_path,
            callbacks=[At(step, sigterm, "prediction_step"), At(step, lambda: batches.append(1), "prediction_step")],
            **EVALUATED,
        )
    assert batches == [1]
    assert stopped.value.checkpoint == str(tmp_path / f"checkpoint-{step}")
    resumed = train(tmp_path, resume=True, **EVALUATED)
    assert_same(state(resumed), state(evaluated))
    losses = [[x["eval_loss"] for x in t.state.log_history if "eval_loss" in x] for t in (resumed, evaluated)]
    assert losses[0] == losses[1]
    assert Path(resumed.state.best_model_checkpoint).name == Path(evaluated.state.best_model_checkpoint).name


def test_sigterm_in_the_last_step_of_an_epoch_leaves_nothing_of_its_end_out(tmp_path):
    settings = {"rows": ROWS[:8], "max_steps": 4, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(Terminated) as stopped:
        train(tmp_path, callbacks=[At(2, sigterm)], **settings)
    assert stopped.value.checkpoint == str(tmp_path / "checkpoint-2")
    resumed = train(tmp_path, resume=True, **settings)
    assert [record["step"] for record in resumed.state.log_history if "eval_loss" in record] == [2, 4]


def test_sigterm_after_the_last_step_has_its_ordinary_effect(tmp_path):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        train(tmp_path, callbacks=[At(2, sigterm, "train_end")], max_steps=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_sigterm_waits_while_workers_start():
    """They inherit the mask, so that none is ended before it has set itself up."""
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with sigterm_held():
            # to this thread: one of another test that is still there would take a signal to the process
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
            assert received == []
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_hosts_own_handler_is_refused(tmp_path):
    with pytest.raises(ValueError, match="enable_jit_checkpoint must be off"):
        make_trainer(tmp_path, enable_jit_checkpoint=True).train()


# ---- what cannot be written


def test_a_token_that_would_be_pickled_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"hub_token would be written into training_args.bin.* HF_TOKEN"):
        make_trainer(tmp_path, hub_token="hf_secret")


def fail_with(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def full_disk(trainer):
    """torch's own error: this device is always full."""
    trainer._save_optimizer_and_scheduler = lambda folder: torch.save(torch.zeros(10**6), "/dev/full")


FAILURES = {
    "full_disk_in_torch": (full_disk, "No space left on device"),
    "full_disk_in_python": (
        lambda trainer: setattr(trainer, "_save_rng_state", lambda folder: Path("/dev/full").write_text("x")),
        "No space left on device",
    ),
    "permission": (
        lambda trainer: setattr(trainer, "_save_rng_state", fail_with(PermissionError(13, "Permission denied"))),
        "Permission denied",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_save_keeps_the_last_checkpoint(case, whole, tmp_path):
    spoil, reason = FAILURES[case]
    trainer = make_trainer(tmp_path)
    trainer.add_callback(At(3, lambda: spoil(trainer)))
    with pytest.raises(CheckpointError, match=f"checkpoint-4' could not be saved: {reason}.*checkpoint-2' is kept"):
        trainer.train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    resumed = train(tmp_path, resume=True)
    assert resumed.began == 2
    assert_same(state(resumed), whole[2])


def test_a_disk_that_is_too_full_is_noticed_before_writing(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(At(3, lambda: monkeypatch.setattr(safe_checkpoint, "free_bytes", lambda folder: 1000)))
    monkeypatch.setattr(
        trainer, "_save_rng_state", lambda folder: pytest.fail("written") if trainer.state.global_step > 2 else None
    )
    with pytest.raises(
        CheckpointError, match=r"the disk is full. It needs about 0.\d\d MB, beside the last one; 0.00 MB"
    ):
        trainer.train()
    assert flaw(tmp_path / "checkpoint-2") is None


def test_an_error_of_another_kind_is_not_explained_away(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer._save_rng_state = fail_with(RuntimeError("out of memory"))
    with pytest.raises(RuntimeError, match=r"^out of memory$"):
        trainer.train()


def test_a_checkpoint_sealed_by_hand_is_taken(tmp_path):
    train(tmp_path, max_steps=2)
    (tmp_path / "checkpoint-2" / MANIFEST).unlink()
    seal(tmp_path / "checkpoint-2")
    assert train(tmp_path, resume=True, max_steps=2).began == 2


@pytest.mark.slow
def test_two_processes(tmp_path):
    torchrun(Path(__file__).with_name("safe_checkpoint_worker.py"), str(tmp_path))
