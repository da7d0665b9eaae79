"""Evaluation while a recipe trains: held-out metrics of every domain, the best checkpoint, early stopping."""

from collections.abc import Mapping
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from hf_moe.finetuning.arguments import RecipeError
from hf_moe.finetuning.domains import Data
from hf_moe.finetuning.measure import evaluate_rows
from hf_moe.finetuning.prepare import Job
from hf_moe.finetuning.save import OwnCardMixin
from hf_moe.training.checkpointing.broken_evaluation import EvaluationBrokenOff
from hf_moe.training.trainer import MoeTrainer


class RecipeTrainer(OwnCardMixin, MoeTrainer):
    """A MoeTrainer that evaluates as the recipe's report does, every labelled token once.

    Metrics: `eval_DOMAIN_loss` and `eval_DOMAIN_bits_per_byte` of every domain, and `eval_loss`, the mean loss with
    the domains' shares of the training rows. Every process evaluates all rows.

    Args:
        job: Of the recipe; its held-out rows are evaluated.
    """

    def __init__(self, *, job: Job[Data], **options: Any):
        self._job = job
        # `evaluate` reads them all; the Trainer only asks whether there are some
        super().__init__(eval_dataset=next(iter(job.data.domains.values())).held_out_rows, **options)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The metrics, logged and shown to the callbacks; outputs that `ignore_keys` names are not read in any case.

        Raises:
            EvaluationBrokenOff: At SIGTERM, between two domains.
            ValueError: For another data set or prefix: the job's held-out rows are evaluated.
        """
        if eval_dataset is not None or metric_key_prefix != "eval":
            raise ValueError("RecipeTrainer evaluates the job's held-out rows as 'eval'. For others use a MoeTrainer.")
        found: dict[str, float] = {"eval_loss": 0.0}
        for name, domain in self._job.data.domains.items():
            if self._may_break_off and self._termination.agreed(self.args.device):
                raise EvaluationBrokenOff
            metrics = evaluate_rows(
                self.model,
                self._job.tokenizer,
                domain.held_out_rows,
                batch_size=self.args.per_device_eval_batch_size,
            )
            found["eval_loss"] += domain.share * metrics.loss
            found[f"eval_{name}_loss"] = metrics.loss
            found[f"eval_{name}_bits_per_byte"] = metrics.bits_per_byte
        self.log(found)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


def check_best_metric(arguments: TrainingArguments, domains: Mapping[str, Any]) -> None:
    """Raises RecipeError if `metric_for_best_model` is none that an evaluation gives."""
    metric = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    known = ["loss", *(f"{name}_{what}" for name in domains for what in ("loss", "bits_per_byte"))]
    if metric not in known:
        raise RecipeError(f"metric_for_best_model must be one of {', '.join(known)}, got {metric!r}.")


class EarlyStopping(EarlyStoppingCallback):
    """transformers' callback, whose count of evaluations without a better one goes on in a run that resumes.

    The Trainer stores the count in every checkpoint, and restores none by itself.
    """

    _restored = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._restore(state)
        super().on_train_begin(args, state, control, **kwargs)

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self._restore(state)  # an evaluation may be made up before the run begins
        super().on_evaluate(args, state, control, metrics, **kwargs)

    def _restore(self, state):
        if not self._restored:
            self._restored = True
            stored = state.stateful_callbacks.get(type(self).__name__, self.state())
            self.early_stopping_patience_counter = stored["attributes"]["early_stopping_patience_counter"]


def early_stopping(arguments: Any) -> list[TrainerCallback]:
    """The callback that ends a run after `early_stopping_patience` evaluations without a better one, if asked for."""
    if arguments.early_stopping_patience is None:
        return []
    return [EarlyStopping(arguments.early_stopping_patience)]
