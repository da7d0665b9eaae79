"""The ordinary Trainer with balancing, safe checkpoints, and the routing in its log."""

from transformers import Trainer

from hf_moe.training.balancing.mixin import BalancingMixin
from hf_moe.training.checkpointing.safe_checkpoint import SafeCheckpointMixin
from hf_moe.training.routing_metrics import RoutingMetricsCallback


class MoeTrainer(SafeCheckpointMixin, BalancingMixin, Trainer):
    """`transformers.Trainer` for models with experts.

    It balances (`MoeTrainer(model, args, ..., balancing=BalancingConfig(...))`, any family: see `BalancingMixin`),
    writes checkpoints that a kill cannot damage and stops at a loss that is not finite (see `SafeCheckpointMixin`),
    and puts the figures of `RoutingMetricsCallback` into every training log. That callback alone cannot reach
    `report_to`: the Trainer stores and reports a log before the callbacks that were passed to it see it.
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
