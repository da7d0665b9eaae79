"""The ordinary Trainer with balancing, safe checkpoints, and the routing in its log."""

from pathlib import Path

from transformers import PreTrainedModel, Trainer

from hf_moe.training.balancing import BalancingMixin
from hf_moe.training.routing_metrics import RoutingMetricsCallback
from hf_moe.training.safe_checkpoint import SafeCheckpointMixin


class MoeTrainer(SafeCheckpointMixin, BalancingMixin, Trainer):
    """`transformers.Trainer` for models with experts.

    It balances (`MoeTrainer(model, args, ..., balancing=BalancingConfig(...))`, any family: see `BalancingMixin`),
    writes checkpoints that a kill cannot damage and stops at a loss that is not finite (see `SafeCheckpointMixin`),
    resumes models whose experts are stored singly, and puts the figures of `RoutingMetricsCallback` into every
    training log. That callback alone cannot reach `report_to`: the Trainer stores and reports a log before the
    callbacks that were passed to it see it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.routing_metrics = RoutingMetricsCallback()
        self.add_callback(self.routing_metrics)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.routing_metrics.close()

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs.update(self.routing_metrics.metrics())
        super().log(logs, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load the weights of a checkpoint through `from_pretrained`.

        The host reads the file as it lies there, with `strict=False`: checkpoints hold every expert singly, memory
        holds them fused. Native families would go on with new experts and a mere warning (transformers 5.23).
        """
        target = self.model if model is None else model
        if not isinstance(target, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if not Path(resume_from_checkpoint, "config.json").exists():
            raise ValueError(
                f"checkpoint {str(resume_from_checkpoint)!r} has no config.json: it is incomplete or no model "
                "checkpoint. Resume from an earlier one."
            )
        loaded = type(target).from_pretrained(resume_from_checkpoint, dtype=target.dtype)
        target.load_state_dict(loaded.state_dict())

    def _load_best_model(self):
        super()._load_best_model()
        if isinstance(self.model, PreTrainedModel):
            self._load_from_checkpoint(self.state.best_model_checkpoint)
