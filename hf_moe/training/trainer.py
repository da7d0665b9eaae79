"""The ordinary Trainer with the routing balance in its log."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, Trainer

from hf_moe.observability.expert_load import ExpertLoad, count_expert_load, load_entropy, max_violation


class MoeTrainer(Trainer):
    """`transformers.Trainer` that logs the routing balance, and that resumes models whose experts are stored singly.

    Every training log gets `moe/load_entropy` (mean over the layers; 1 is balanced), `moe/load_entropy_min` and
    `moe/max_violation` (the worst layer). A callback cannot add them: the Trainer stores and reports a log before user
    callbacks see it.
    """

    expert_load: ExpertLoad | None = None

    def train(self, *args, **kwargs):
        with count_expert_load(self.model, training_only=True) as self.expert_load:
            return super().train(*args, **kwargs)

    def log(self, logs, *args, **kwargs):
        if self.expert_load is not None and "loss" in logs and self.expert_load.counts:
            logs.update(self._balance(list(self.expert_load.counts.values())))
            self.expert_load.clear()
        super().log(logs, *args, **kwargs)

    def _balance(self, counts: list[torch.Tensor]) -> dict[str, float]:
        """Balance since the last log, over all processes."""
        flat = torch.cat(counts).to(self.accelerator.device)
        totals = self.accelerator.reduce(flat, "sum").cpu().split([len(layer) for layer in counts])
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
