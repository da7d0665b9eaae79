"""The weights of a checkpoint, back in the model that is being trained."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer


class CheckpointLoadingMixin(Trainer):
    """Loads the weights of a checkpoint through `from_pretrained`, to resume or as the best at the end.

    The host reads the file as it lies there, with `strict=False`: checkpoints hold every expert singly, memory holds
    them fused. Native families would go on with new experts and a mere warning (transformers 5.23).
    """

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target: Any = self.model if model is None else model
        if not isinstance(target, PreTrainedModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        if not Path(resume_from_checkpoint, "config.json").exists():
            raise ValueError(
                f"checkpoint {str(resume_from_checkpoint)!r} has no config.json: it is incomplete or no model "
                "checkpoint. Resume from an earlier one."
            )
        loaded = type(target).from_pretrained(resume_from_checkpoint, dtype=_widest_dtype(target))
        target.load_state_dict(loaded.state_dict())

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if isinstance(self.model, PreTrainedModel):
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _widest_dtype(model: nn.Module) -> torch.dtype:
    """In which nothing is rounded: `from_pretrained` makes all weights of one type, and a router may be float32."""
    return max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda dtype: dtype.itemsize)
