"""What the safe Trainer overrides or calls in the Trainer of transformers is what it was written against.

If a test here fails, transformers has changed: read what it does now before the parameters are adapted.
"""

import inspect

import pytest
from transformers import Trainer, TrainerControl, TrainerState

from hf_moe.training.checkpointing.broken_evaluation import BreakableEvaluationMixin
from hf_moe.training.checkpointing.non_finite import FiniteTrainingMixin
from hf_moe.training.checkpointing.resumption import CheckpointLoadingMixin
from hf_moe.training.checkpointing.safe_checkpoint import SafeCheckpointMixin

MIXINS = (SafeCheckpointMixin, FiniteTrainingMixin, BreakableEvaluationMixin, CheckpointLoadingMixin)
# the first parameters, as far as they are used by position or name
OVERRIDDEN = {
    "_evaluate": "trial ignore_keys_for_eval skip_scheduler",
    "_get_dataloader": "",
    "_get_grad_norm": "model grad_norm",
    "_get_output_dir": "trial",
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_maybe_log_save_evaluate": "tr_loss grad_norm model trial epoch ignore_keys_for_eval start_time",
    "_push_from_checkpoint": "checkpoint_folder",
    "_run_epoch": "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval "
    "start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "_save_checkpoint": "model trial",
    "get_batch_samples": "",
    "get_train_dataloader": "",
    "prediction_step": "",
    "train": "resume_from_checkpoint",
    "training_step": "",
}
CALLED = {"_load_rng_state": "checkpoint", "_save_rng_state": "output_dir"}


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_the_host_has_the_method(name):
    expected = (OVERRIDDEN | CALLED)[name].split()
    assert list(inspect.signature(getattr(Trainer, name)).parameters)[1 : len(expected) + 1] == expected


def test_nothing_else_of_the_host_is_overridden():
    """A name of ours that transformers begins to use would replace it."""
    ours = {name for mixin in MIXINS for name in vars(mixin) if not name.startswith("__")}
    assert {name for name in ours if hasattr(Trainer, name)} == OVERRIDDEN.keys()


def test_a_checkpoint_tells_whether_an_evaluation_is_owed():
    state = TrainerState(stateful_callbacks=[TrainerControl(should_evaluate=True)])
    assert state.stateful_callbacks["TrainerControl"]["args"]["should_evaluate"] is True
