"""Hear the routing of a training: every decision that a gradient flows through, once."""

from contextlib import ExitStack

import torch
from torch import nn
from transformers import TrainerCallback

from hf_moe.models.moe_layers import MoeLayer
from hf_moe.models.watch_routing import Routing, watch_routing


class RoutingListener(TrainerCallback):
    """Calls `on_routing` with each decision of the training's forwards, from the begin of the training to its end.

    Left out is what runs without gradients or in evaluation mode: evaluation, generation, the reference model of a
    preference loss. Under gradient checkpointing a decision is heard once.
    """

    def __init__(self) -> None:
        self.layers: list[MoeLayer] = []
        self._recomputes = False
        self._hooks = ExitStack()

    def on_routing(self, event: Routing) -> None:
        raise NotImplementedError

    def open(self, model: nn.Module) -> None:
        """Listen until `close`.

        Raises:
            ValueError: If the model has no MoE layer.
        """
        self._hooks.close()
        self._recomputes = recomputes_reentrantly(model)
        self.layers = self._hooks.enter_context(watch_routing(model, self._hear))

    def close(self) -> None:
        """Take the hooks off; the Trainer does not say so to its callbacks if the training fails."""
        self._hooks.close()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.open(model)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def _hear(self, event: Routing) -> None:
        # a reentrant checkpoint runs its first forward without gradients: then the second one is heard
        is_first = self._recomputes or not event.is_recomputation
        if is_first and torch.is_grad_enabled() and event.layer.experts.training:
            self.on_routing(event)


def recomputes_reentrantly(model: nn.Module) -> bool:
    """Whether a part of the model runs under reentrant gradient checkpointing."""
    for module in model.modules():
        options = getattr(vars(module).get("_gradient_checkpointing_func"), "keywords", {})
        if vars(module).get("gradient_checkpointing") and options.get("use_reentrant", False):
            return True
    return False
