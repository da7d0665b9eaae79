"""Callbacks that stop a run which has gone wrong, before it saves what went wrong."""

import math

from transformers import ProgressCallback, TrainerCallback

from hf_moe.adapters.frozen_router import verify_router_frozen


class StopOnNonFinite(TrainerCallback):
    """Stop with an error at the first logged loss or gradient norm that is NaN or infinite.

    One such step turns all weights into NaN, and the Trainer would go on and save them. Logs come before saves; let
    `save_steps` be a multiple of `logging_steps`, and set `logging_nan_inf_filter=False` (it shows NaN losses as 0).
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {state.global_step}: training has diverged. Lower the learning rate, "
                    "or look at the data of the last steps; the last saved checkpoint is from before."
                )


class RouterFreezeCallback(TrainerCallback):
    """Check at the start, at every save and at the end of training that the routers are frozen and unchanged.

    Raises RouterNotFrozenError, at a save before the Trainer goes on to train.
    """

    def __init__(self) -> None:
        self.router_hash: str | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.router_hash = verify_router_frozen(model)

    def on_save(self, args, state, control, model=None, **kwargs):
        verify_router_frozen(model, self.router_hash)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        verify_router_frozen(model, self.router_hash)


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
