"""Log the routing of a training, and warn or stop when a router collapses."""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal

import torch
from torch import nn
from transformers.trainer_callback import ExportableState

from hf_moe.layers.moe_layers import moe_layers
from hf_moe.layers.watch_routing import Routing
from hf_moe.observability.health import (
    ENOUGH_FOR_COLLAPSE,
    Finding,
    Health,
    Verdict,
    diagnose,
    enough_tokens,
    spread,
)
from hf_moe.observability.layer_statistics import LayerStatistics, empty_statistics
from hf_moe.observability.layer_sums import LayerSums, ScoreRule
from hf_moe.training.routing_listener import RoutingListener

logger = logging.getLogger(__name__)

# a longer history would call a slow, wanted specialisation a collapse
_HISTORY = 12
_GRAVE: set[Verdict] = {"invalid", "collapsed", "one_takes_most", "collapsing"}

_SKEWED: set[Verdict] = {"collapsed", "one_takes_most"}
# share of the baseline's spread below which a layer is worse
_WORSE = 0.5


class RoutingWindow(RoutingListener):
    """Statistics of a training's routing since they were last taken."""

    def open(self, model: nn.Module) -> None:
        super().open(model)
        self._rules = {layer.name: ScoreRule() for layer in self.layers}
        self._sums: dict[str, LayerSums] = {}

    def on_routing(self, event: Routing) -> None:
        name = event.layer.name
        if name not in self._sums:
            self._sums[name] = LayerSums(event.layer, self._rules[name], event.index.device, coactivation=False)
        self._sums[name].add(event)

    def take(self) -> list[LayerStatistics]:
        """By layer, over all processes, which must all call it; then counting starts again."""
        taken, self._sums = self._sums, {}
        mine = []
        for layer in self.layers:
            if layer.name in taken:
                taken[layer.name].flush()
                statistics, _ = taken[layer.name].read(self._rules[layer.name].confirmed() is not None)
                mine.append(statistics)
            else:
                mine.append(empty_statistics(layer.plain_name, layer.num_experts, layer.top_k, coactivation=False))
        return _over_processes(mine)


class RoutingMetricsCallback(RoutingWindow):
    """Add the balance of the routing to every training log, for any MoE model of transformers.

    Keys, over the layers that saw tokens: `moe/load_cv` and `moe/load_cv_max`, `moe/max_violation`,
    `moe/load_entropy` and `moe/load_entropy_min` (1 is balanced), `moe/router_entropy` (where the router's scores are
    known), `moe/dead_experts` (their number), `moe/dropped` (share, where the router tells),
    `moe/router_grad_norm` (mean over the optimizer's steps). Their number does not grow with the model.

    The Trainer reports a log before the callbacks that were passed to it see it: `log_history` and callbacks after
    this one get them; for TensorBoard and trackio as well use `MoeTrainer`, which has them without a callback,
    or `attach`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._grad_norms: list[torch.Tensor] = []

    def attach(self, trainer) -> "RoutingMetricsCallback":
        """Put this callback in front of the trainer's others, so that those which report see its metrics."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def metrics(self) -> dict[str, float]:
        """The metrics since they were last taken, over all processes."""
        norms, self._grad_norms = self._grad_norms, []
        found = balance_metrics(self.take())
        if norms:
            found["moe/router_grad_norm"] = fmean(float(norm) for norm in norms)
        return found

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [
            parameter.grad
            for layer in self.layers
            if layer.router is not None
            for parameter in layer.router.parameters()
            if parameter.grad is not None
        ]
        if gradients:
            self._grad_norms.append(nn.utils.get_total_norm(gradients))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs and "moe/load_cv" not in logs:
            found = self.metrics()
            logs.update(found)
            state.log_history[-1].update(found)


class CollapseCallback(RoutingWindow, ExportableState):
    """Judge the routing whenever the log has seen enough tokens, and warn or stop with the layer and the cause.

    The verdicts are those of `diagnose`, layer by layer: also of eight layers that each send all tokens to an expert
    of their own. A slow fall is seen over the last judgements.

    The first step is the baseline. A layer that is skewed in it (collapsed, or one expert takes most tokens), as in
    some bases that are fine-tuned, is named once and judged only where it gets worse: where the experts in effect
    used beyond the chosen ones (`spread`) become less than half. Checkpoints of the Trainer keep the baseline.

    Args:
        action: "warn" logs; "stop" also ends the training at a collapse (`should_training_stop`). Dead experts, a
            router without gradient and drops only warn.
        patience: Judgements in a row that must be bad before anything is done: fresh routers are uneven.

    Attributes:
        health: The last judgement, None before the first.
        baseline: `spread` of the layers that were skewed at the start, by name; None before the first step.
    """

    def __init__(self, action: Literal["warn", "stop"] = "warn", patience: int = 2):
        super().__init__()
        if action not in ("warn", "stop"):
            raise ValueError(f"action must be 'warn' or 'stop', got {action!r}.")
        if patience < 1:
            raise ValueError(f"patience must be at least 1 judgement, got {patience}.")
        self.action, self.patience = action, patience
        self.health: Health | None = None
        self.baseline: dict[str, float] | None = None
        self._history: deque[list[LayerStatistics]] = deque(maxlen=_HISTORY)
        self._pending: list[LayerStatistics] = []
        self._bad = 0

    def state(self) -> dict[str, Any]:
        """What checkpoints keep of it."""
        return {
            "args": {"action": self.action, "patience": self.patience},
            "attributes": {"baseline": self.baseline},
        }

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        super().on_train_begin(args, state, control, model=model, **kwargs)
        self._pending = []
        # the Trainer gives it back only where it is asked to restore its callbacks, and needs it to save them
        kept = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        kept = kept[0] if isinstance(kept, list) else kept
        self.baseline = kept["attributes"]["baseline"] if state.global_step else None

    def on_step_end(self, args, state, control, **kwargs):
        if self.baseline is not None:
            return
        self._gather()
        seen = [layer for layer in self._pending if layer.tokens]
        if not seen or any(float(layer.counts.sum()) < ENOUGH_FOR_COLLAPSE * layer.num_experts for layer in seen):
            return
        skewed = {finding.layer for finding in diagnose(seen).findings if finding.kind in _SKEWED}
        self.baseline = {layer.name: spread(layer) for layer in seen if layer.name in skewed}
        if skewed:
            logger.warning(
                "routing skewed since the start, not judged unless it gets worse: %s. The base is like that: no "
                "collapse of this training.",
                ", ".join(self.baseline),
            )

    def on_log(self, args, state, control, model=None, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        self._gather()
        spoilt = _spoilt_routers(model)
        seen = [layer for layer in self._pending if layer.tokens]
        if not spoilt and not (seen and all(enough_tokens(layer) for layer in seen)):
            return
        self.health = Health("invalid", None, spoilt) if spoilt else self._judge(seen)
        self._pending = []
        self._bad = 0 if self.health.healthy else self._bad + 1
        if spoilt or self._bad >= self.patience:
            self._act(state.global_step, control)

    def _gather(self) -> None:
        taken = self.take()
        self._pending = [one + two for one, two in zip(self._pending, taken, strict=True)] if self._pending else taken

    def _judge(self, seen: list[LayerStatistics]) -> Health:
        names = [layer.name for layer in seen]
        history = [point for point in self._history if [layer.name for layer in point] == names]
        self._history.append(seen)
        return _against(diagnose(seen, history), seen, self.baseline or {})

    def _act(self, step: int, control) -> None:
        assert self.health is not None
        stops = self.action == "stop" and self.health.verdict in _GRAVE
        logger.log(
            logging.ERROR if stops else logging.WARNING,
            "routing at step %d%s: %s",
            step,
            ", training stops" if stops else "",
            self.health,
        )
        self._bad = 0
        if stops:
            control.should_training_stop = True


def _against(health: Health, seen: Sequence[LayerStatistics], baseline: Mapping[str, float]) -> Health:
    """The judgement without what was so at the start."""
    if not any(finding.layer in baseline and finding.kind in _SKEWED for finding in health.findings):
        return health
    now = {layer.name: spread(layer) for layer in seen}
    findings = []
    for finding in health.findings:
        if finding.layer in baseline and finding.kind in _SKEWED:
            if now[finding.layer] >= baseline[finding.layer] * _WORSE:
                continue
            finding = replace(finding, message=f"worse than at the start: {finding.message}")
        findings.append(finding)
    has_collapsed = any(finding.kind == "collapsed" for finding in findings)
    whole = health.pattern if len(findings) == len(health.findings) else "some_layers"
    return Health(findings[0].kind if findings else "healthy", whole if has_collapsed else None, tuple(findings))


def balance_metrics(layers: Sequence[LayerStatistics]) -> dict[str, float]:
    """Balance of the routing for a log, over the layers that saw tokens; empty if none did."""
    seen = [layer for layer in layers if layer.counts.any()]
    if not seen:
        return {}
    found = {
        "moe/load_cv": fmean(layer.load_cv for layer in seen),
        "moe/load_cv_max": max(layer.load_cv for layer in seen),
        "moe/max_violation": max(layer.max_violation for layer in seen),
        "moe/load_entropy": fmean(layer.load_entropy for layer in seen),
        "moe/load_entropy_min": min(layer.load_entropy for layer in seen),
        "moe/dead_experts": float(sum(len(layer.dead_experts) for layer in seen)),
    }
    if entropies := [layer.router_entropy for layer in seen if not math.isnan(layer.router_entropy)]:
        found["moe/router_entropy"] = fmean(entropies)
    if drops := [layer.drop_share for layer in seen if not math.isnan(layer.drop_share)]:
        found["moe/dropped"] = fmean(drops)
    return found


def _spoilt_routers(model: nn.Module) -> tuple[Finding, ...]:
    return tuple(
        Finding(layer.plain_name, "invalid", "the router's weights are NaN or infinite.")
        for layer in moe_layers(model)
        if layer.router is not None and not all(bool(p.isfinite().all()) for p in layer.router.parameters())
    )


def _over_processes(mine: list[LayerStatistics]) -> list[LayerStatistics]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mine
    gathered: list[list[LayerStatistics]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, mine)
    totals = gathered[0]
    for others in gathered[1:]:
        totals = [one + two for one, two in zip(totals, others, strict=True)]
    return totals
