"""What a run that is started again gets from a checkpoint, what it does not, and where it cannot go on at all."""

from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_moe.training.checkpointing.checkpoints import CheckpointError

logger = logging.get_logger(__name__)

_FSDP_WEIGHTS = "pytorch_model_fsdp"
_OPTIMIZERS = ("optimizer.pt", "optimizer.bin")


def is_sharded_at_loading(trainer: Any) -> bool:
    """Whether transformers' own engine trains the model (`DistributedConfig`): its Trainer resumes nothing."""
    return bool(getattr(trainer, "is_distributed_loading_by_transformers", False))  # not there in transformers 5.17


def is_resumable(trainer: Any) -> bool:
    """Whether a run can go on from the checkpoints that this one writes."""
    return not (is_sharded_at_loading(trainer) or (trainer.is_fsdp_enabled and trainer.args.save_only_model))


def limit_to_weights(trainer: Any) -> None:
    """On transformers' own engine, save no optimizer: of its state every process holds a part, and one would write.

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


def say_what_is_lost(trainer: Any, resumed: str | None) -> None:
    """A warning before training if checkpoints hold the weights alone, or the one that is `resumed` does."""
    if not trainer.is_world_process_zero():
        return
    anew = "begins with a new optimizer, a learning rate schedule at its start and other random numbers"
    if not is_resumable(trainer):
        logger.warning(
            "Checkpoints of this run hold the weights alone, and it cannot be resumed (see save_only_model): after an "
            "interruption load one with from_pretrained and train it in another output_dir, which " + anew + "."
        )
    elif trainer.args.save_only_model:
        logger.warning(f"save_only_model: a run that is resumed from a checkpoint of this one {anew}.")
    engine_keeps_its_own = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if (
        resumed is not None
        and not engine_keeps_its_own
        and not any(Path(resumed, name).exists() for name in _OPTIMIZERS)
    ):
        logger.warning(f"{resumed!r} holds the weights alone: this run goes on at its step, but {anew}.")


def refuse_resuming(trainer: Any, folder: str | None) -> None:
    """Raise where the Trainer would fail on one process and leave the others waiting.

    Raises:
        CheckpointError: If the engine of this run cannot resume from `folder`.
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
