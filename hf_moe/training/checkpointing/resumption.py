"""Resume from a checkpoint: its weights, a warning of what it lacks, and a refusal where a run cannot continue."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.utils import logging

from hf_moe.training.checkpointing.checkpoints import CheckpointError

logger = logging.get_logger(__name__)

_FSDP_WEIGHTS = "pytorch_model_fsdp"
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")


def is_sharded_at_loading(trainer: Any) -> bool:
    """True if transformers sharded the model itself (`DistributedConfig`): its Trainer then resumes nothing."""
    return bool(getattr(trainer, "is_distributed_loading_by_transformers", False))  # not there in transformers 5.17


def is_resumable(trainer: Any) -> bool:
    """True if a run can be resumed from the checkpoints that this one writes."""
    return not (is_sharded_at_loading(trainer) or (trainer.is_fsdp_enabled and trainer.args.save_only_model))


def limit_to_weights(trainer: Any) -> None:
    """Save no optimizer under `DistributedConfig`: of its state every process holds a part, and one would write.

    Raises:
        ValueError: If the best model is to be loaded at the end, which would fail there.
    """
    if not is_sharded_at_loading(trainer):
        return
    if trainer.args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end must be off: the Trainer cannot load weights into a model that DistributedConfig "
            "sharded. Load state.best_model_checkpoint with from_pretrained after the run."
        )
    trainer.args.save_only_model = True


def warn_of_what_is_lost(trainer: Any, resumed: str | None) -> None:
    """Warn before training if checkpoints hold the weights alone, or the one that is `resumed` does."""
    if not trainer.is_world_process_zero():
        return
    afresh = "begins with a new optimizer, a learning rate schedule at its start and other random numbers"
    if not is_resumable(trainer):
        logger.warning(
            "Checkpoints of this run hold the weights alone, and it cannot be resumed (see save_only_model): after an "
            "interruption load one with from_pretrained and train it in another output_dir, which " + afresh + "."
        )
    elif trainer.args.save_only_model:
        logger.warning(f"save_only_model: a run that is resumed from a checkpoint of this one {afresh}.")
    keeps_its_own_optimizer = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if (
        resumed is not None
        and not keeps_its_own_optimizer
        and not any(Path(resumed, name).exists() for name in _OPTIMIZERS)
    ):
        logger.warning(f"{resumed!r} holds the weights alone: this run continues at its step, but {afresh}.")


def refuse_resuming(trainer: Any, folder: str | None) -> None:
    """Raise where the Trainer would fail on one process and leave the others waiting.

    Raises:
        CheckpointError: If this run cannot resume from `folder`.
    """
    if folder is None:
        return
    way_out = "Load the model from it with from_pretrained, and train it in another output_dir."
    if is_sharded_at_loading(trainer):
        raise CheckpointError(
            f"cannot resume from {folder!r}: the Trainer does not resume a model that DistributedConfig sharded. "
            + way_out
        )
    if trainer.is_fsdp_enabled and not any(Path(folder).glob(f"{_FSDP_WEIGHTS}*")):
        raise CheckpointError(
            f"cannot resume from {folder!r} under FSDP: it has no {_FSDP_WEIGHTS}, which save_only_model leaves out. "
            + way_out
        )


class CheckpointLoadingMixin(Trainer):
    """Load the weights of a checkpoint through `from_pretrained`, to resume or as the best at the end.

    The Trainer reads the file as it is, with `strict=False`: checkpoints hold every expert by itself, memory holds
    them fused. Native families would train on with new experts and a mere warning (transformers 5.23).
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
    """The dtype that rounds nothing: `from_pretrained` makes all weights of one type, and a router may be float32."""
    return max((p.dtype for p in model.parameters() if p.is_floating_point()), key=lambda dtype: dtype.itemsize)
