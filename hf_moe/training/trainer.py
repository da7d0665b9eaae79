"""The ordinary Trainer with balancing, safe checkpoints, and the routing in its log."""

from transformers import Trainer

from hf_moe.training.balancing.mixin import BalancingMixin
from hf_moe.training.checkpointing.safe_checkpoint import SafeCheckpointMixin
from hf_moe.training.routing_metrics import RoutingMetricsCallback


class MoeTrainer(SafeCheckpointMixin, BalancingMixin, Trainer):
    """`transformers.Trainer` for Mixture-of-Experts models of any family.

    It balances the experts' load (`BalancingMixin`), writes checkpoints that a kill cannot damage and stops at a loss
    that is not finite (`SafeCheckpointMixin`), and puts the metrics of `RoutingMetricsCallback` into every training
    log. That callback alone cannot reach `report_to`: the Trainer stores and reports a log before the callbacks that
    were passed to it see it.

    Args:
        balancing: A `BalancingConfig`; `None` balances nothing. Everything else is as in `transformers.Trainer`.

    Attributes:
        routing_metrics: The callback; `routing_metrics.metrics()` takes what the next log would get.

    Raises:
        BalancingError: If a term cannot work on the model; see `BalancingMixin`.
        ValueError: For a `hub_token` in the arguments.

    Raises (from `train`):
        ValueError: If the model has no MoE layer.
        CheckpointError, NonFiniteError, SameWeightsError, Terminated, RunRefusedError: See `SafeCheckpointMixin`.
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
