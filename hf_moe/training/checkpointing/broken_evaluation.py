"""Evaluation that stops at SIGTERM, and is run again by the run that resumes.

A scheduler waits half a minute between SIGTERM and the kill; an evaluation may take longer.
"""

import tempfile
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_moe.training.checkpointing.termination import TerminationRequest


class EvaluationBrokenOff(Exception):  # noqa: N818 (no error: it never leaves the Trainer)
    """SIGTERM came between two batches of an evaluation. Random states are restored to those before it."""


class BreakableEvaluationMixin(Trainer):
    """Stop an evaluation at SIGTERM: EvaluationBrokenOff leaves `_maybe_log_save_evaluate`, and the step is saved."""

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
        """True if the checkpoint that this run resumes from was saved before its evaluation was complete."""
        flow = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        return bool(flow.get("should_evaluate")) and self.args.eval_strategy != "no"


class MakeUpEvaluation(TrainerCallback):
    """Run the evaluation that the resumed checkpoint lacks, before the first step."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.make_up_evaluation()
