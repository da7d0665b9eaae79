"""The ordinary Trainer with balancing, and with the routing balance in its log."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from hf_moe.models.watch_routing import Routing
from hf_moe.observability.expert_load import load_entropy, max_violation
from hf_moe.training.balancing import BalancingMixin
from hf_moe.training.balancing_losses import assignment_counts, routing_choice
from hf_moe.training.routing_listener import RoutingListener


class MoeTrainer(BalancingMixin, Trainer):
    """`transformers.Trainer` that balances, logs the balance, and resumes models whose experts are stored singly.

    `MoeTrainer(model, args, ..., balancing=BalancingConfig(...))` works on any family: see `BalancingMixin`.

    Every training log gets `moe/load_entropy` (mean over the layers; 1 is balanced), `moe/load_entropy_min` and
    `moe/max_violation` (the worst layer), without padding. A callback cannot add them: the Trainer stores and reports
    a log before user callbacks see it.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.expert_load = _TrainingLoad()
        self.add_callback(self.expert_load)

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.expert_load.close()

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs.update(self._balance(list(self.expert_load.counts.values())))
            self.expert_load.clear()
        super().log(logs, *args, **kwargs)

    def _balance(self, counts: list[Tensor]) -> dict[str, float]:
        """Balance since the last log, over all processes."""
        if not counts:
            return {}
        flat = torch.cat([layer.to(self.accelerator.device) for layer in counts])
        totals = self.accelerator.reduce(flat, "sum").cpu().split([len(layer) for layer in counts])
        # a layer that no token reached has no balance: the vision experts of a text-only step
        totals = [layer for layer in totals if layer.any()]
        if not totals:
            return {}
        entropies = [load_entropy(layer) for layer in totals]
        return {
            "moe/load_entropy": sum(entropies) / len(entropies),
            "moe/load_entropy_min": min(entropies),
            "moe/max_violation": max(max_violation(layer) for layer in totals),
        }

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


class _TrainingLoad(RoutingListener):
    """Assignments that the experts really got since the last log, `[E]` by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, Tensor] = {}

    def open(self, model: nn.Module) -> None:
        super().open(model)
        self.clear()

    def clear(self) -> None:
        # of every layer: another process may run one that this does not
        self.counts = {layer.name: torch.zeros(layer.num_experts, dtype=torch.int64) for layer in self.layers}

    def on_routing(self, event: Routing) -> None:
        experts = event.layer.num_experts
        num_choices = experts if event.logits is None else max(experts, event.logits.shape[-1])
        choice = routing_choice(replace(event, choice=None), num_choices)
        mask = None if event.mask is None else event.mask.to(choice.device)
        counts = assignment_counts(choice, num_choices, mask)[:experts]
        self.counts[event.layer.name] = self.counts[event.layer.name].to(counts.device) + counts
