"""Balancing in the Trainer: a mixin for any Trainer class, and a callback for what a callback can do.

class BalancedSFTTrainer(BalancingMixin, SFTTrainer): ...
BalancedSFTTrainer(model, args, ..., balancing=BalancingConfig(aux_loss_coef=0.01))
"""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from hf_moe.layers.watch_routing import Routing
from hf_moe.training.balancing.bias_update import BiasUpdater
from hf_moe.training.balancing.checks import BalancingError, balanced_layers
from hf_moe.training.balancing.config import BalancingConfig
from hf_moe.training.balancing.losses import assignment_counts, routing_choice
from hf_moe.training.balancing.step_share import count_step_tokens, count_tokens, step_share
from hf_moe.training.balancing.terms import BalancingTerms
from hf_moe.training.routing_listener import RoutingListener
from hf_moe.training.same_weights import SameWeightsCallback, SameWeightsMixin


class _BalancingRun(RoutingListener):
    """One training: what its decisions become, and the updates after each optimizer step."""

    def __init__(self, config: BalancingConfig):
        super().__init__()
        self.config = config
        self.terms: BalancingTerms | None = None
        self.bias: BiasUpdater | None = None

    def open(self, model: nn.Module) -> None:
        layers = balanced_layers(model, self.config)
        super().open(model)
        self.terms = BalancingTerms(self.config, layers) if self.config.has_loss else None
        rate = self.config.bias_update_rate
        self.bias = BiasUpdater(model, layers, rate) if rate > 0 else None

    def close(self) -> None:
        super().close()
        self.terms = self.bias = None

    def on_routing(self, event: Routing) -> None:
        if self.terms is not None:
            self.terms.add(event)
        if self.bias is not None and self.bias.updates(event.layer):
            self.bias.add(event.layer, _counts(event, self.bias.num_choices(event.layer)))

    def on_recomputation(self, event: Routing) -> Callable[[Tensor], Tensor] | None:
        return None if self.terms is None else self.terms.late_gradient(event)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        is_skipped = isinstance(optimizer, AcceleratedOptimizer) and optimizer.step_was_skipped
        if self.terms is not None:
            self.terms.end_step()
        if self.bias is not None and is_skipped:
            self.bias.clear()
        elif self.bias is not None:
            self.bias.step()


def _counts(event: Routing, num_choices: int) -> Tensor:
    choice = routing_choice(event, num_choices)
    return assignment_counts(choice, num_choices, None if event.mask is None else event.mask.to(choice.device))


class BalancingCallback(_BalancingRun):
    """The loss-free bias update for any Trainer: after each optimizer step, from the load of all processes.

    A callback cannot add to the loss, nor put metrics into the log: for an auxiliary loss or a z-loss use
    `MoeTrainer`, or `BalancingMixin` before another Trainer class. If a training fails with an exception the hooks
    stay on the model until the callback's `close` is called. Also a `SameWeightsCallback`.

    Raises:
        ValueError: If the config asks for a loss.
        BalancingError: From the Trainer's `train`, before the first forward, if the model keeps no bias to update.
    """

    def __init__(self, config: BalancingConfig):
        if config.has_loss:
            raise ValueError(
                "a callback cannot add a loss: BalancingCallback takes bias_update_rate alone. Use MoeTrainer, or a "
                "class of BalancingMixin and your Trainer, for aux_loss_coef and z_loss_coef."
            )
        super().__init__(config)
        self._same_weights = SameWeightsCallback()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._same_weights.on_train_begin(args, state, control, model=model, **kwargs)
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self._same_weights.on_optimizer_step(args, state, control, optimizer=optimizer, **kwargs)
        super().on_optimizer_step(args, state, control, optimizer=optimizer, **kwargs)


class BalancingMixin(SameWeightsMixin):
    """Balance what a Trainer trains: a base class to put before `Trainer`, or before a Trainer of TRL.

    Losses are added in `compute_loss`, from the decisions of every forward in it that has gradients, and in training
    alone: `eval_loss` is the task's. A micro-batch counts with its share of the step's tokens, so that one optimizer
    step has one gradient however its rows are cut into micro-batches and processes (`aux_loss_scope="layer"` balances
    each micro-batch by itself, so there the cut matters; see `BalancingConfig`). Where the batches do not tell
    their tokens (trainers that generate), micro-batches count alike.

    The training log gets `moe/aux_loss` and `moe/z_loss`, means over the optimizer steps since the last log without
    their weights, and `moe/bias_range`, the largest difference between the biases of two experts of a layer.

    Args:
        balancing: The terms; `None` leaves the Trainer as it is. Everything else goes to the Trainer.

    Raises:
        BalancingError: When it is built, and again before the first step, if a term cannot work on the model; in the
            first forward, if the router's output cannot be read; after the first steps, if a term sent no gradient.

    Source: Fedus et al. 2021 (arXiv:2101.03961), Zoph et al. 2022 (arXiv:2202.08906), Qiu et al. 2025
    (arXiv:2501.11873) and Wang et al. 2024 (arXiv:2408.15664): see the terms of `BalancingConfig`.
    """

    def __init__(self, *args: Any, balancing: BalancingConfig | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.balancing = balancing
        self._balancing_run: _BalancingRun | None = None
        self._step_tokens: Tensor | None = None
        self._logged: dict[str, Tensor] = {}
        if balancing is not None:
            self._refuse_parallelism(balancing)
            balanced_layers(self.model, balancing)
            self._refuse_second_source(balancing)
            self._balancing_run = _BalancingRun(balancing)
            self.add_callback(self._balancing_run)

    def train(self, *args, **kwargs):
        self._logged = {}
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._balancing_run is not None:
                self._balancing_run.close()

    def get_batch_samples(self, *args, **kwargs):
        samples, num_items = super().get_batch_samples(*args, **kwargs)
        if self.balancing is not None and self.balancing.has_loss:
            tokens = count_step_tokens(samples, self.args.device)
            if tokens is not None:
                # the ranks of one tensor parallel group have the same rows
                tokens = self.accelerator.reduce(tokens, "sum") // self.get_tp_size()
            self._step_tokens = tokens
        return samples, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        terms = None if self._balancing_run is None else self._balancing_run.terms
        if terms is None or not (self.model.training and torch.is_grad_enabled()):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        terms.clear()
        tokens = count_tokens(inputs)
        result = super().compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        loss, outputs = result if return_outputs else (result, None)
        loss = terms.attach(loss)
        loss = loss + self._balancing_loss(terms, tokens, num_items_in_batch).to(loss)
        terms.release()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        if "loss" in logs and self._logged:
            sums = self.accelerator.reduce(torch.stack(list(self._logged.values())), "sum").tolist()
            totals = dict(zip(self._logged, sums, strict=True))
            steps = totals.pop("steps")
            logs.update({f"moe/{term}": total / steps for term, total in totals.items()})
            self._logged = {}
        if "loss" in logs and self._balancing_run is not None and self._balancing_run.bias is not None:
            logs["moe/bias_range"] = self._balancing_run.bias.largest()
        super().log(logs, *args, **kwargs)

    def _balancing_loss(self, terms: BalancingTerms, tokens: Tensor | None, num_items: Any) -> Tensor:
        processes = self.accelerator.num_processes // self.get_tp_size()
        accumulation = self.current_gradient_accumulation_steps
        if tokens is None or self._step_tokens is None:
            share = torch.tensor(1 / (accumulation * processes), dtype=torch.float64)
        else:
            share = step_share(tokens, self._step_tokens)
        losses = terms.losses(share / self.get_tp_size())
        self._remember(losses, share)
        # gradients are averaged over the processes; the Trainer divides some losses by the micro-batches of the step
        scale = processes * (accumulation if self._is_divided_by_accumulation(num_items) else 1)
        total = terms.weighted_sum(losses)
        return total * share.to(total) * scale

    def _remember(self, losses: dict[str, Tensor], share: Tensor) -> None:
        for name, value in {**losses, "steps": torch.ones_like(next(iter(losses.values())))}.items():
            value = (value.detach() * share.to(value)).float()
            self._logged[name] = self._logged[name] + value if name in self._logged else value

    def _is_divided_by_accumulation(self, num_items: Any) -> bool:
        """The rule of `Trainer.training_step`, which is no function of its own (transformers 5.17 to 5.23)."""
        # a class attribute since 5.21
        declared = getattr(self, "loss_is_scaled_for_ga", None)
        if declared is not None:
            return not declared
        return not ((self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None)

    def _refuse_second_source(self, config: BalancingConfig) -> None:
        # TRL's trainers read the coefficient once, and ask the model for its loss in each call
        if config.aux_loss_coef > 0 and getattr(self, "aux_loss_enabled", False):
            raise BalancingError(
                f"{type(self).__name__} adds the model's balancing loss by itself (router_aux_loss_coef "
                f"{self.router_aux_loss_coef}): balancing would count twice. Pass router_aux_loss_coef=0.0 in its "
                "config, or leave aux_loss_coef out of BalancingConfig."
            )

    def _refuse_parallelism(self, config: BalancingConfig) -> None:
        if config.has_loss and (self.get_cp_size() > 1 or self.get_sp_size() > 1):
            raise BalancingError(
                "balancing losses see the tokens of a whole row, which context and sequence parallelism cut. Balance "
                "with bias_update_rate alone."
            )
        if self.args.n_gpu > 1:
            raise BalancingError(
                f"DataParallel over {self.args.n_gpu} GPUs copies the model for each forward, and its routing is not "
                "seen. Start one process for each GPU (torchrun), or show it one (CUDA_VISIBLE_DEVICES)."
            )
