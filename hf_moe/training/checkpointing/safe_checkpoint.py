"""Checkpoints of the Trainer that survive: kills, full disks, SIGTERM, and a run that has diverged.

On one node a checkpoint is written to `_unfinished/`, flushed, sealed with a manifest and then renamed, so that nobody
ever sees half of one. On several nodes the Trainer writes into the final folder: a rename by one node is not atomic
for the others on network and object storage (transformers tried it twice and took it back, #29370 and #36112), and
there the manifest alone marks what is complete. What is resumed from is decided by the manifest in both cases.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_peft_available, logging

from hf_moe.io.run_lock import folder_held
from hf_moe.io.whole_files import move_into_place
from hf_moe.training.checkpointing.broken_evaluation import (
    BreakableEvaluationMixin,
    EvaluationBrokenOff,
    MakeUpEvaluation,
)
from hf_moe.training.checkpointing.checkpoints import (
    MANIFEST,
    SKIPPED,
    TOKEN_IS_PICKLED,
    UNFINISHED,
    CheckpointError,
    checkpoints,
    clean_up,
    delete_old_checkpoints,
    flaw,
    free_bytes,
    newest_sealed,
    refuse_one_checkpoint,
    seal,
    seal_additions,
    sealed_bytes,
    write_failure,
)
from hf_moe.training.checkpointing.non_finite import FiniteTrainingMixin, NonFiniteError, non_finite_weight
from hf_moe.training.checkpointing.resumption import (
    CheckpointLoadingMixin,
    is_resumable,
    limit_to_weights,
    refuse_resuming,
    warn_of_what_is_lost,
)
from hf_moe.training.checkpointing.termination import (
    Terminated,
    TerminationRequest,
    mark_resumable,
    outlive_group_signal,
    sigterm_held,
    unmark_resumable,
)
from hf_moe.training.same_weights import SameWeightsMixin

logger = logging.get_logger(__name__)


class SafeCheckpointMixin(
    FiniteTrainingMixin, BreakableEvaluationMixin, CheckpointLoadingMixin, SameWeightsMixin, Trainer
):
    """For any Trainer: `class MyTrainer(SafeCheckpointMixin, SFTTrainer)`.

    - A checkpoint appears whole, with a manifest of sizes and SHA-256. Older ones are deleted, and the new one is
      pushed, only after that; the old and the new need room at once, which is checked before writing.
    - `train(resume_from_checkpoint=True)` takes the newest *valid* checkpoint and warns about those it skipped;
      `"auto"` does the same and begins at step 0 if there is none. A path is checked as well.
    - SIGTERM: the step is finished, saved, and `Terminated` (a SystemExit with the exit code 75) is raised. A resumed
      run gives the same weights, bit for bit. Only the next line of the log differs: it covers the steps since. An
      evaluation is broken off, and run again when the run resumes. `torchrun` ends with 1 then; the file `RESUMABLE`
      in the output folder says that the run can be resumed.
    - A loss, gradient norm or weight that is not finite stops the run: see `FiniteTrainingMixin`.
    - Several processes: `evaluate()` before `train()` does no harm, and the first step is proved to be one model's
      (`SameWeightsCallback`).

    What cannot be resumed exactly: data that draws random numbers in the workers of the DataLoader, and
    `save_only_model` (a warning at the start names what is lost) or `ignore_data_skip`. Under FSDP a run with
    `save_only_model`, and under `DistributedConfig` every run, cannot be resumed at all: its
    checkpoints hold the weights, SIGTERM ends it with the exit code 143, and resuming is refused.

    Raises:
        ValueError: For a `hub_token`: the Trainer pickles its arguments beside the weights.

    Raises (from `train`):
        CheckpointError: A checkpoint cannot be written (the earlier ones are kept) or is not valid.
        NonFiniteError: See there.
        SameWeightsError: The processes train apart.
        Terminated: See above.
        RunRefusedError: Another run works in the output folder; names it.
        ValueError: `enable_jit_checkpoint` is on; several nodes with a `save_total_limit` of 1;
            `load_best_model_at_end` under `DistributedConfig`.
    """

    checkpoint_rename: bool | None = None
    """True to write checkpoints beside and rename them; None: on one node. False for storage without renames."""

    _staging: Path | None = None
    _saved_step: int | None = None
    _ended_step: int | None = None
    _push_waits = False
    control: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._termination = TerminationRequest()
        super().__init__(*args, **kwargs)
        if self.args.hub_token is not None:
            raise ValueError(TOKEN_IS_PICKLED)
        self.add_callback(MakeUpEvaluation(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        _refuse(self.args, rename=self._renames())
        limit_to_weights(self)
        with ExitStack() as held:
            self.last_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint, held)
            warn_of_what_is_lost(self, self.last_checkpoint)
            if self.args.should_save:
                unmark_resumable(Path(str(self.args.output_dir)))
            self._saved_step, self._ended_step, self._push_waits = None, None, False
            held.enter_context(self._termination)
            return super().train(self.last_checkpoint, *args, **kwargs)

    def _renames(self) -> bool:
        one_node = self.args.world_size <= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return one_node if self.checkpoint_rename is None else self.checkpoint_rename

    def _checkpoint_to_resume(self, wanted: str | bool | None, held: ExitStack) -> str | None:
        """The folder, chosen by the main process for all. It holds the output folder from here on."""
        from accelerate.utils import broadcast_object_list

        choice: list[Any] = [None]
        if self.args.process_index == 0:
            try:
                held.enter_context(folder_held(str(self.args.output_dir), nested=True))
                choice = [_choose(str(self.args.output_dir), wanted)]
                refuse_resuming(self, choice[0])
            except (CheckpointError, ValueError) as error:
                choice = [error]  # raised below by every process
        broadcast_object_list(choice)
        if isinstance(choice[0], Exception):
            raise choice[0]
        return choice[0]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        folder = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._refuse_non_finite()
        if self.args.should_save:
            _refuse_full_disk(folder, self._needed_bytes(run_dir), self.last_checkpoint)
        with self._explained(folder):
            if self._renames():
                self._save_and_rename(model, trial, run_dir, folder)
            else:
                super()._save_checkpoint(model, trial)
                self._seal(folder)
        self.last_checkpoint, self._saved_step = str(folder), self.state.global_step
        if self._push_waits:
            self._push_waits = False
            super()._push_from_checkpoint(str(folder))

    def _save_and_rename(self, model: nn.Module, trial: Any, run_dir: Path, folder: Path) -> None:
        if self.args.should_save:
            shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)  # of a save that failed
        self.accelerator.wait_for_everyone()
        self._staging = run_dir / UNFINISHED
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        staged = run_dir / UNFINISHED / folder.name
        self._name_best(run_dir, folder, staged)
        self._seal(staged)
        if self.args.should_save:
            move_into_place(staged, folder)
            shutil.rmtree(run_dir / UNFINISHED, ignore_errors=True)
            keep = {folder, Path(self.state.best_model_checkpoint or folder)}
            delete_old_checkpoints(run_dir, self.args.save_total_limit, keep)
        self.accelerator.wait_for_everyone()

    def _name_best(self, run_dir: Path, folder: Path, staged: Path) -> None:
        """Name the best checkpoint where it is, or will be: the Trainer looks for it where this one is written."""
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if str(best) != self.state.best_model_checkpoint and (best == folder or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
            if self.args.should_save:
                self.state.save_to_json(str(staged / TRAINER_STATE_NAME))

    def _seal(self, folder: Path) -> None:
        """When every process has written its part."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal(folder)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # in the background it would upload a folder that is about to be sealed and renamed
        self._push_waits = True

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args: Any, **kwargs: Any) -> None:
        comes_again = self._is_called_again()
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
            stop = self._termination.agreed(self.args.device) and not comes_again
        except EvaluationBrokenOff:
            stop = True
        self._save_once(model, trial, needed=stop)
        if stop:
            self._end(Path(str(self.last_checkpoint)))

    def _end(self, checkpoint: Path) -> None:
        """Raises Terminated."""
        ending = Terminated(str(checkpoint), is_resumable(self))
        next_step = "the weights can be loaded from there, but the run cannot be resumed"
        if is_resumable(self):
            next_step = "the same command, with resume_from_checkpoint, continues from here"
            if self.args.should_save:
                mark_resumable(Path(str(self.args.output_dir)), checkpoint)
        logger.warning(f"SIGTERM: saved {str(checkpoint)!r}. Ending with the exit code {ending.code}; {next_step}.")
        raise ending

    def _save_once(self, model: nn.Module, trial: Any, needed: bool) -> None:
        """Save this step if it is needed and was not; what callbacks wrote into its checkpoint belongs to it."""
        saved = self._saved_step == self.state.global_step
        if needed and not saved:
            self._save_checkpoint(model, trial)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        if (needed or saved) and self.args.should_save:
            seal_additions(Path(str(self.last_checkpoint)))

    def make_up_evaluation(self) -> None:
        """Evaluate the step that was resumed from, and save it again, if SIGTERM had left no time for that."""
        if self.last_checkpoint is None or not self.evaluation_is_owed():
            return
        logger.warning(f"The evaluation of step {self.state.global_step} was broken off: it is run now.")
        self._load_rng_state(self.last_checkpoint)
        self.control.should_evaluate = self.control.should_save = True
        self._maybe_log_save_evaluate(
            self._tr_loss, None, self.model_wrapped, None, self.state.epoch, None, start_time=0.0
        )
        self._save_once(self.model_wrapped, None, needed=True)  # the Trainer may want to save the best only

    def _is_called_again(self) -> bool:
        """True if the Trainer calls for this step once more, at the end of the epoch, with work of its own to do."""
        came, self._ended_step = self._ended_step == self.state.global_step, self.state.global_step
        ends = float(self.state.epoch or 0).is_integer() or self.control.should_training_stop
        return ends and not came

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        # the first of an epoch starts the workers: torch lets SIGTERM end them until they have set themselves up
        with sigterm_held() if self.args.dataloader_num_workers else nullcontext():
            return super().get_batch_samples(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        dataloader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(dataloader, "base_dataloader", dataloader)  # accelerate's wrapper passes no settings on
        inner.worker_init_fn = partial(outlive_group_signal, self._termination.listening, inner.worker_init_fn)
        return dataloader

    def _refuse_non_finite(self) -> None:
        self.check_finite()
        if (name := non_finite_weight(self.model)) is not None:
            what = f"the weight {name!r} has values that are NaN or infinite"
            raise NonFiniteError(what, self.state.global_step, checkpoint=self.last_checkpoint)

    def _needed_bytes(self, run_dir: Path) -> int:
        """Size of the next checkpoint: of what is in memory, or of the last one if that was larger."""
        known = [sealed_bytes(folder) for folder in checkpoints(run_dir)[:1]]
        optimizer = None if self.args.save_only_model else self.optimizer
        return max([*known, state_bytes(self.model, optimizer)])

    @contextmanager
    def _explained(self, folder: Path) -> Iterator[None]:
        """Say why a checkpoint cannot be written; the room that its beginning takes is given back."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if (reason := write_failure(error)) is None:
                raise
            needed = self._needed_bytes(folder.parent)
            shutil.rmtree(folder.parent / UNFINISHED, ignore_errors=True)
            raise _not_saved(folder, reason, needed, self.last_checkpoint) from error


def state_bytes(model: nn.Module, optimizer: Any) -> int:
    """Bytes of what a checkpoint holds: the weights (of an adapter, those that are trained) and the optimizer."""
    saved = [p for p in model.parameters() if p.requires_grad] if _is_adapter(model) else model.parameters()
    weights = sum(p.numel() * p.element_size() for p in saved)
    state = optimizer.state.values() if optimizer is not None else ()
    tensors = (value for values in state for value in values.values() if isinstance(value, torch.Tensor))
    return weights + sum(value.numel() * value.element_size() for value in tensors)


def _is_adapter(model: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _choose(output_dir: str, wanted: str | bool | None) -> str | None:
    clean_up(output_dir)
    if wanted is None or wanted is False:
        return None
    if wanted is not True and wanted != "auto":
        return _checked(Path(wanted))
    there_are_some = bool(checkpoints(Path(output_dir)))
    newest = newest_sealed(output_dir)
    if newest is None and wanted is True:
        raise ValueError(
            f"no valid checkpoint in {output_dir!r}. Start from the beginning (resume_from_checkpoint 'auto' does), "
            f"or name one that you know to be whole: one without a {MANIFEST} is taken as it is, also as "
            f"{SKIPPED + '...'!r}."
        )
    if newest is not None:
        logger.warning(f"Resuming from {newest!r}.")
    elif there_are_some:
        logger.warning(f"No valid checkpoint in {output_dir!r}: starting from the beginning.")
    return newest


def _checked(folder: Path) -> str:
    if not folder.is_dir():
        raise CheckpointError(f"cannot resume from {str(folder)!r}: there is no such folder. Choose another, or True.")
    if not (folder / MANIFEST).exists():
        logger.warning(f"{str(folder)!r} has no {MANIFEST}: whether it is whole cannot be checked.")
    elif (reason := flaw(folder)) is not None:
        raise CheckpointError(f"cannot resume from {str(folder)!r}: {reason}. Choose another, or True.")
    return str(folder)


def _refuse(args: Any, rename: bool) -> None:
    if args.enable_jit_checkpoint:
        raise ValueError("enable_jit_checkpoint must be off: SIGTERM saves a checkpoint here as it is.")
    if not rename:
        refuse_one_checkpoint(args.save_total_limit)


def _refuse_full_disk(folder: Path, needed: int, last: str | None) -> None:
    if free_bytes(folder.parent) < needed:
        raise _not_saved(folder, "the disk is full", needed, last)


def _not_saved(folder: Path, reason: str, needed: int, last: str | None) -> CheckpointError:
    kept = f"{last!r} is kept and whole: resume from it" if last else "There was none before: begin again"
    return CheckpointError(
        f"{str(folder)!r} could not be saved: {reason}. It needs about {_size(needed)}, beside the last one; "
        f"{_size(free_bytes(folder.parent))} are free. {kept} once this is repaired."
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
