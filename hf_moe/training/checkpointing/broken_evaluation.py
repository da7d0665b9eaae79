"""Evaluations between two steps can be broken off, and are made anew by the run that resumes.

A scheduler that sends SIGTERM waits half a minute before it kills; an evaluation may take longer.
"""

import tempfile
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_moe.training.checkpointing.termination import TerminationRequest


class EvaluationBrokenOff(Exception):  # noqa: N818 (no error: it never leaves the Trainer)
    """SIGTERM came between two batches of an evaluation. The random states are those of before it."""


class BreakableEvaluationMixin(Trainer):
    """Raises EvaluationBrokenOff out of the host's `_maybe_log_save_evaluate`, so that a step can be saved at once."""

    _termination: TerminationRequest
    _may_break_off = False

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if skip_scheduler:  # `eval_on_start`: there is no step to save yet
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=True)
        with tempfile.TemporaryDirectory() as before:
            self._save_rng_state(before)
            self._may_break_off = True
            try:
                return super()._evaluate(trial, ignore_keys_for_eval)
            except EvaluationBrokenOff:
                self._load_rng_state(before)
                raise
            finally:
                self._may_break_off = False

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._may_break_off and self._termination.agreed(self.args.device):
            raise EvaluationBrokenOff
        return super().prediction_step(*args, **kwargs)

    def evaluation_is_owed(self) -> bool:
        """Whether the checkpoint that this run came from was saved when its evaluation was broken off."""
        flow = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        return bool(flow.get("should_evaluate")) and self.args.eval_strategy != "no"


class MakeUpEvaluation(TrainerCallback):
    """Has the Trainer make an evaluation that is owed, before the first step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.make_up_evaluation()
