"""Roll training back to the last good weights when routing leaves its thresholds."""

import json
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from hf_moe.io.old_names import renamed_argument
from hf_moe.io.whole_files import whole_folder, write_json
from hf_moe.observability.thresholds import MetricValue, RoutingThresholds, Verdict

logger = logging.getLogger(__name__)

BEST_FOLDER = "gated-best"
STATE, VERDICT = "restore.pt", "gate.json"


class Probe(Protocol):
    """Measures a model for thresholds; `TextProbe` does it on texts by domain."""

    def measure(self, model: nn.Module) -> Any:
        """Measure the model in its present state; leave its mode and weights as they are."""

    def metrics(self, base: Any, new: Any) -> Mapping[str, MetricValue]:
        """Metrics of two measurements that `RoutingThresholds` can bound, by name."""


class RollbackCallback(TrainerCallback):
    """Check thresholds at every evaluation and save, keep the best weights that pass, and restore them when later
    ones fail.

    The best are those with the lowest `bits_per_byte.all`; without that metric the latest. They lie in
    `output_dir/gated-best` as a model (or adapter) that `from_pretrained` loads, with the verdict (`gate.json`) and
    what restoring needs (`restore.pt`: trained parameters, buffers, optimizer state). Restoring leaves the
    learning-rate schedule and the order of the data as they are: training continues with other batches. The weights
    that end the run have passed, unless none ever did. Each verdict is a record of `log_history` (`gate_passed`,
    `gate_failures`).

    Args:
        thresholds: The thresholds, or the path of their file.
        probe: Measures the model.
        against: What metrics of change are relative to: the model that training starts from (without its adapter),
            or the best that passed.
        reference: A measurement by `probe` of the model to compare with. Needed to resume the training of a whole
            model: what it started from is not there any more.
        stop_after: Stop after so many failures in a row.

    Raises:
        ThresholdsError: If the thresholds cannot be used.
        ValueError: From the Trainer's `train`, with settings that it cannot work with.
    """

    @renamed_argument("gate", "thresholds")
    def __init__(
        self,
        thresholds: RoutingThresholds | str | Path,
        probe: Probe,
        *,
        against: Literal["base", "best"] = "base",
        reference: Any = None,
        stop_after: int = 3,
    ):
        if against not in ("base", "best"):
            raise ValueError(f"against must be 'base' or 'best', got {against!r}.")
        if stop_after < 1:
            raise ValueError(f"stop_after must be at least 1, got {stop_after}.")
        if not isinstance(thresholds, RoutingThresholds):
            thresholds = RoutingThresholds.load(thresholds)
        self.thresholds = thresholds
        self.probe, self.against, self.stop_after = probe, against, stop_after
        self.reference = reference
        self.best_step: int | None = None
        self.failures_in_a_row = 0
        self._best_value: float | None = None
        self._judged_step = -1

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        _refuse_settings(args)
        if self.reference is None:
            self.reference = self._measure_base(model, state)
        self._adopt_saved(args, state, model)
        if self.best_step is None:
            self._judge(args, state, control, model, optimizer)

    def on_evaluate(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step:  # evaluate() alone calls this as well
            self._judge(args, state, control, model, optimizer)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        # before the Trainer saves: a checkpoint that fails is never written
        if control.should_save and not control.should_evaluate:
            self._judge(args, state, control, model, optimizer)

    def on_epoch_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.on_step_end(args, state, control, model=model, optimizer=optimizer)

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._judge(args, state, control, model, optimizer)

    def _measure_base(self, model: Any, state: Any) -> Any:
        if hasattr(model, "disable_adapter"):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
            try:
                with model.disable_adapter():
                    return self.probe.measure(model)
            finally:  # PEFT freezes its adapters meanwhile, and then makes all of the active ones trainable
                _set_trainable(trained, True)
                _set_trainable(frozen, False)
        if state.global_step:
            raise ValueError(
                f"training resumes at step {state.global_step}: the model that it started from is not there to be "
                "compared with. Pass reference=probe.measure(model) of that model."
            )
        return self.probe.measure(model)

    def _adopt_saved(self, args: Any, state: Any, model: Any) -> None:
        """Take over the best of the run that is resumed; a run that starts from step 0 has none."""
        folder = Path(args.output_dir, BEST_FOLDER)
        if not state.global_step or not (folder / VERDICT).exists():
            return
        saved = json.loads((folder / VERDICT).read_text(encoding="utf-8"))
        self.best_step, self._best_value = saved["step"], saved["best_value"]
        if self.against == "best":
            present = {name: tensor.clone() for name, tensor in _trained(model).items()}
            _restore(folder / STATE, model, None)
            self.reference = self.probe.measure(model)
            _put_back(present, model)

    def _judge(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any) -> None:
        if state.global_step == self._judged_step:
            return
        self._judged_step = state.global_step
        measured = self.probe.measure(model)
        metrics = _metrics(self.probe, self.reference, measured)
        # one process decides for all: timings differ between them
        verdict, value = _of_main_process((self.thresholds.judge(metrics), _finite(metrics.get("bits_per_byte.all"))))
        state.log_history.append(
            {
                "step": state.global_step,
                "gate_passed": verdict.passed,
                "gate_failures": [str(failed) for failed in verdict.failures],
            }
        )
        if verdict.passed:
            self._passed(args, state, model, optimizer, measured, verdict, value)
        else:
            self._failed(args, state, control, model, optimizer, verdict)

    def _passed(self, args, state, model, optimizer, measured, verdict: Verdict, value: float | None) -> None:
        self.failures_in_a_row = 0
        if self.best_step is not None and value is not None and self._best_value is not None:
            # relative to the best itself, what is better is below 0
            best_value = 0.0 if self.against == "best" else self._best_value
            if value >= best_value:
                return
        self.best_step, self._best_value = state.global_step, value
        if self.against == "best":
            self.reference = measured
        if state.is_world_process_zero:
            _save(Path(args.output_dir, BEST_FOLDER), model, optimizer, verdict, state.global_step, value)
        _wait_for_all()

    def _failed(self, args, state, control, model, optimizer, verdict: Verdict) -> None:
        if not state.global_step:
            logger.warning(
                "the model that training starts from does not pass: there is nothing to go back to.\n%s", verdict
            )
            return
        self.failures_in_a_row += 1
        where = "nothing has passed yet: the weights stay"
        if self.best_step is not None:
            _restore(Path(args.output_dir, BEST_FOLDER) / STATE, model, optimizer)
            where = f"back to the weights of step {self.best_step}"
        logger.warning("step %d: %s\n%s", state.global_step, where, verdict)
        if self.failures_in_a_row >= self.stop_after:
            logger.warning("training stops: the thresholds failed %d times in a row.", self.failures_in_a_row)
            control.should_training_stop = True


def _set_trainable(parameters: list[nn.Parameter], is_trained: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(is_trained)


def _refuse_settings(args: Any) -> None:
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end=True would replace the weights that passed the thresholds at the end. Set it to "
            "False: the best that passed is kept."
        )
    if getattr(args, "fsdp", None) or args.deepspeed:
        raise ValueError("weights that are sharded (FSDP, DeepSpeed ZeRO) cannot be restored here. Train with DDP.")
    if args.save_strategy == IntervalStrategy.NO and args.eval_strategy == IntervalStrategy.NO:
        raise ValueError(
            "the thresholds are checked at evaluations and saves, and there are none. Set save_steps or eval_steps."
        )


@torch.no_grad()
def _save(folder: Path, model: Any, optimizer: Any, verdict: Verdict, step: int, value: float | None) -> None:
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        torch.save({"tensors": _trained(model), "optimizer": _optimizer_state(optimizer)}, temporary / STATE)
        write_json(temporary / VERDICT, {"step": step, "best_value": value, **verdict.to_dict()})


@torch.no_grad()
def _restore(path: Path, model: Any, optimizer: Any) -> None:
    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    present = _trained(model)
    if present.keys() != saved["tensors"].keys():
        changed = sorted(present.keys() ^ saved["tensors"].keys())
        raise ValueError(
            f"{path} holds other tensors than the model trains now ({changed[0]}, ...). Train the same parameters, or "
            "use a new output_dir."
        )
    _put_back(saved["tensors"], model)
    if optimizer is not None and saved["optimizer"] is not None:
        # the learning rates stay the scheduler's
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": saved["optimizer"], "param_groups": groups})


@torch.no_grad()
def _put_back(tensors: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    for name, tensor in _trained(model).items():
        tensor.copy_(tensors[name])


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tensors that training changes: parameters with a gradient, and buffers, such as a router's selection bias."""
    parameters = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    return {**parameters, **dict(model.named_buffers())}


def _optimizer_state(optimizer: Any) -> dict[int, Any] | None:
    return None if optimizer is None else optimizer.state_dict()["state"]


def _metrics(probe: Any, base: Any, new: Any) -> Mapping[str, MetricValue]:
    if hasattr(probe, "metrics"):
        return probe.metrics(base, new)
    text = f"the method {type(probe).__name__}.figures of a probe is now called metrics: rename it."
    warnings.warn(text, FutureWarning, stacklevel=2)
    return probe.figures(base, new)


def _finite(metric: MetricValue | None) -> float | None:
    return None if metric is None or metric.value is None or not math.isfinite(metric.value) else metric.value


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _of_main_process(values: tuple[Verdict, float | None]) -> tuple[Verdict, float | None]:
    if not _is_distributed():
        return values
    box = [values]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def _wait_for_all() -> None:
    if _is_distributed():
        torch.distributed.barrier()
