"""Callbacks for the Trainer: proof of a frozen router, and a progress bar that shows the balance."""

import logging
from pathlib import Path
from typing import Any

from transformers import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_moe.adapters.frozen_router import (
    HASH_FILE,
    RouterNotFrozenError,
    auxiliary_coefficients,
    report_auxiliary_losses,
    router_record,
    verify_adapter_base,
    verify_router_frozen,
    write_router_record,
)
from hf_moe.training.same_weights import SameWeightsCallback

logger = logging.getLogger(__name__)


class RouterFreezeCallback(SameWeightsCallback):
    """Prove that a run leaves the routers as they are, and leave the proof beside what it saves.

    Refuses to start if a router tensor can be trained (it requires a gradient, carries an adapter or has a trainable
    copy: `target_modules="all-linear"` does that); hashes all routers before training, at every save and at the end;
    raises if one value changed, at a save before the Trainer continues to train. The SHA-256 is written as
    `router_hash.json` into each checkpoint and into `output_dir`, for `verify_adapter_base`. A resumed run must begin
    with the routers of its checkpoint. An auxiliary loss that is on is logged; one that TRL's trainers add although
    `freeze_router` turned it off in the model is refused in the first forward. Also a `SameWeightsCallback`.

    Raises:
        RouterNotFrozenError: From the Trainer's `train`.
        SameWeightsError: See there.
    """

    def __init__(self) -> None:
        self.router_hash: str | None = None
        self._trl_watch: Any = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer)
        self.router_hash = verify_router_frozen(model)
        report_auxiliary_losses(model)
        self._watch_trl(args, model)
        resumed = _checkpoint(args, state)
        if (resumed / HASH_FILE).exists():
            verify_adapter_base(resumed, model, strict=True)
        # already here: every push while training sends this folder
        self._record(state, model, Path(args.output_dir))

    def on_save(self, args, state, control, model=None, **kwargs):
        verify_router_frozen(model, self.router_hash)
        if _checkpoint(args, state).is_dir():  # a hyperparameter search saves elsewhere
            self._record(state, model, _checkpoint(args, state))

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        # the Trainer pushes a checkpoint before it says that it was saved
        self.on_save(args, state, control, model=model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        verify_router_frozen(model, self.router_hash)
        self._record(state, model, Path(args.output_dir))
        self._unwatch_trl()

    def _watch_trl(self, args, model) -> None:
        """TRL's trainers read the coefficient when they are built, and ask for router logits where they use it."""
        self._unwatch_trl()
        if hasattr(args, "router_aux_loss_coef"):
            self._trl_loss_is_reported = False
            self._trl_watch = model.register_forward_pre_hook(self._check_trl_loss, with_kwargs=True)

    def _check_trl_loss(self, model, args, kwargs) -> None:
        if not (model.training and kwargs.get("output_router_logits")) or self._trl_loss_is_reported:
            return
        what = "TRL's trainer adds the auxiliary loss of a frozen router, which trains attention and experts alone. "
        if not auxiliary_coefficients(model):
            raise RouterNotFrozenError(
                f"{what}Pass router_aux_loss_coef=0.0 in its config, or call freeze_router before the trainer is "
                "built (with keep_aux_loss=True if the loss is wanted)."
            )
        logger.warning("%srouter_aux_loss_coef=0.0 in its config turns it off.", what)
        self._trl_loss_is_reported = True

    def _unwatch_trl(self) -> None:
        if self._trl_watch is not None:
            self._trl_watch.remove()
            self._trl_watch = None

    def _record(self, state, model, folder: Path) -> None:
        record = router_record(model)  # by all processes: sharded routers are gathered
        if state.is_world_process_zero:
            write_router_record(folder, record)


def _checkpoint(args, state) -> Path:
    """The folder of the checkpoint of this step."""
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


class BalanceProgress(ProgressCallback):
    """The Trainer's progress bar, with the loss and the routing balance of each log on one short line."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "loss" in (logs or {}):
            text = f"step {state.global_step:>5}  loss {logs['loss']:.3f}"
            if "moe/load_entropy" in logs:
                text += (
                    f"  load entropy {logs['moe/load_entropy']:.3f} (1 = balanced)"
                    f"  busiest expert {1 + logs['moe/max_violation']:.2f} x mean"
                )
            self.training_bar.write(text)
