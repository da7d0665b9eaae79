"""Listen to the routing of a training: every decision that a gradient flows through, once."""

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.watch_routing import Routing, watch_routing


class RoutingListener(TrainerCallback):
    """Call `on_routing` with each decision of the training's forwards, from its begin to its end.

    Left out is what runs without gradients or in evaluation mode: evaluation, generation, the reference model of a
    preference loss. Under gradient checkpointing a decision counts once, in the first forward.
    """

    def __init__(self) -> None:
        self.layers: list[MoeLayer] = []
        self._hooks = ExitStack()

    def on_routing(self, event: Routing) -> None:
        raise NotImplementedError

    def on_recomputation(self, event: Routing) -> Callable[[Tensor], Tensor] | None:
        """Gradient checkpointing runs a forward once more; return what its hidden states go through, if anything."""
        return None

    def open(self, model: nn.Module) -> None:
        """Listen until `close`.

        Raises:
            ValueError: If the model has no MoE layer.
        """
        self._hooks.close()
        self.layers = self._hooks.enter_context(watch_routing(model, self._on_event))

    def close(self) -> None:
        """Take the hooks off; the Trainer does not call its callbacks if the training fails."""
        self._hooks.close()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.open(model)

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def _on_event(self, event: Routing) -> Callable[[Tensor], Tensor] | None:
        if not event.layer.experts.training:
            return None
        if event.is_recomputation:
            return self.on_recomputation(event)
        # a reentrant checkpoint runs its first forward without gradients, in a call of the model that has them
        if torch.is_grad_enabled() or (event.call is not None and event.call.has_grad):
            self.on_routing(event)
        return None
