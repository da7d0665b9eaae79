"""The log on the screen: one line of at most 80 columns, the loss and three numbers of the routing."""

from collections.abc import Mapping

from tqdm.auto import tqdm
from transformers import ProgressCallback

LEGEND = (
    "routing: busiest = load of the busiest expert over the mean, in the worst layer\n"
    "(1x is even); dead = experts that no token chose (0 is good); CV = spread of the\n"
    "load over the experts (0 is even). Compare with the first line: a rise is a bad\n"
    "sign. metrics.jsonl has the rest."
)


class ScreenLog(ProgressCallback):
    """In place of the Trainer's own callback: its bar, and of every log a short line, also without the bar."""

    def __init__(self) -> None:
        super().__init__()
        self.has_legend = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.current_step = 0
        if state.is_world_process_zero and not args.disable_tqdm:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, **kwargs):
        if not args.disable_tqdm:
            super().on_prediction_step(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = log_line(logs, state.global_step, state.max_steps)
        if not state.is_world_process_zero or line is None:
            return
        if "moe/max_violation" in logs and not self.has_legend:
            self.has_legend = True
            tqdm.write(LEGEND)
        tqdm.write(line)


def log_line(logs: Mapping[str, float], step: int, steps: int) -> str | None:
    """The line of a training step or of an evaluation; None for the Trainer's summary at the end."""
    place = f"step {step:>{len(str(steps))}}/{steps}"
    if "loss" in logs:
        parts = [place, f"loss {logs['loss']:.3f}", f"lr {logs.get('learning_rate', 0):.1e}"]
        if "moe/max_violation" in logs:
            parts += [
                f"busiest {1 + logs['moe/max_violation']:.3g}x",
                f"dead {logs['moe/dead_experts']:.0f}",
                f"CV {logs['moe/load_cv']:.2f}",
            ]
        return "  ".join(parts)
    if "eval_loss" not in logs:
        return None
    domains = [(name[5:-5], value) for name, value in logs.items() if name.startswith("eval_") and name[5:-5]]
    listed = [f"{name} {value:.3f}" for name, value in domains if f"eval_{name}_loss" in logs]
    return f"{place}  held-out loss {logs['eval_loss']:.3f}" + (f" ({', '.join(listed)})" if listed else "")
