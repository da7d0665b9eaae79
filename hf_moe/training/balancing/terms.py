"""The balancing terms of a micro-batch, from the decisions that its forward made."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.router_scores import RouterScores, recognize_scores
from hf_moe.layers.watch_routing import Routing
from hf_moe.models.late_gradient import LateGradient
from hf_moe.models.losses import GlobalBatchCounts, count_assignments, load_balancing_loss, router_z_loss
from hf_moe.models.routing import RoutingDecision
from hf_moe.training.balancing.checks import BalancingError, reaches
from hf_moe.training.balancing.config import BalancingConfig
from hf_moe.training.balancing.losses import joined_decision, sequence_balancing_loss

# a layer must have sent a gradient of each term to its router by then
FIRST_STEPS = 4


class BalancingTerms:
    """Collect a micro-batch's decisions (`add`), turn them into losses (`losses`), and prove their gradients.

    The graph of the decisions is held from the forward until `release`. What the logits mean is recognised in the
    first forward of each layer.

    Reentrant gradient checkpointing computes decisions without gradients. `attach` gives them some before the losses
    are made of them, and `late_gradient` brings what arrives there into the layer when the backward runs it again.
    """

    def __init__(self, config: BalancingConfig, layers: Sequence[MoeLayer]):
        self._config = config
        self._layers = {layer.name: layer for layer in layers}
        self._scores: dict[str, RouterScores] = {}
        self._events: dict[str, list[Routing]] = defaultdict(list)
        # decisions of reentrant checkpoints: the logits of the first forward, and the gradient that they get
        self._late: dict[str, list[tuple[Tensor, LateGradient]]] = defaultdict(list)
        self._reached: set[str] = set()
        self._global_counts = GlobalBatchCounts()
        # pairs of a term and a layer that saw tokens; those that got a gradient are taken out
        self._unproved: dict[tuple[str, str], str] = {}
        self._proved: set[tuple[str, str]] = set()
        self._steps = 0

    def add(self, event: Routing) -> None:
        """Keep a decision; the callback of `watch_routing`, for forwards with gradients.

        Raises:
            BalancingError: If the router returns no logits, logits that cannot be read, or ones without a gradient.
        """
        layer = event.layer
        if layer.name not in self._layers or not len(event.index):
            return
        if layer.name not in self._scores:
            self._scores[layer.name] = _checked_scores(event, self._config)
        self._events[layer.name].append(event)

    def clear(self) -> None:
        """Forget the micro-batch."""
        self._events.clear()
        self._late.clear()

    def release(self) -> None:
        """Let the decisions go; what the backward needs stays."""
        self._events.clear()

    def attach(self, loss: Tensor) -> Tensor:
        """The micro-batch's loss as it is, after which decisions of reentrant checkpoints have gradients."""
        for name, events in self._events.items():
            for number, event in enumerate(events):
                if event.logits is not None and not event.logits.requires_grad:
                    late = LateGradient()
                    loss, (logits,) = late.attach(loss, [event.logits])
                    self._late[name].append((event.logits, late))
                    events[number] = replace(event, logits=logits)
        return loss

    def late_gradient(self, event: Routing) -> Callable[[Tensor], Tensor] | None:
        """The function for the hidden states of a layer that the backward runs again; None where nothing is due.

        Raises:
            BalancingError: If the logits have no gradient to the router.
        """
        name, logits = event.layer.name, event.logits
        if logits is None:
            return None
        due = [(kept, late) for kept, late in self._late[name] if late.arrived and kept.shape == logits.shape]
        if not due:
            return None
        if name not in self._reached:
            _refuse_detached(event.layer, logits)
            self._reached.add(name)
        late = due[0][1]
        if len(due) > 1:  # several forwards of the layer before one backward, which begins with the last
            now = logits.detach()
            late = min(reversed(due), key=lambda pair: float((pair[0] - now).abs().max()))[1]
        return partial(late.deliver, tensors=[logits])

    def losses(self, share: Tensor) -> dict[str, Tensor]:
        """The terms that are on, each a mean over the layers: `aux_loss`, `z_loss`, scalars without their weights.

        Args:
            share: The part of the optimizer step, over all processes, that this micro-batch is.

        Raises:
            BalancingError: If no decision was added.
        """
        if not self._events:
            raise BalancingError(
                "no MoE layer was seen in a training forward: it ran without gradients, or was compiled before the "
                "training began. Compile through TrainingArguments(torch_compile=True)."
            )
        names = [name for name in self._layers if name in self._events]
        decisions = {name: joined_decision(self._events[name], self._scores[name]) for name in names}
        by_layer: dict[str, dict[str, Tensor]] = {}
        if self._config.aux_loss_coef > 0:
            by_layer["aux_loss"] = self._balance(decisions, share)
        if self._config.z_loss_coef > 0:
            by_layer["z_loss"] = {name: router_z_loss(*decisions[name]) for name in names}
        self._prove(by_layer)
        device = decisions[names[0]][0].scores.device
        return {
            term: torch.stack([value.to(device) for value in values.values()]).mean()
            for term, values in by_layer.items()
        }

    def weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        """The sum of what `losses` returned, with the weights of the config."""
        weights = {"aux_loss": self._config.aux_loss_coef, "z_loss": self._config.z_loss_coef}
        return torch.stack([weights[term] * value for term, value in losses.items()]).sum()

    def end_step(self) -> None:
        """An optimizer step is done.

        Raises:
            BalancingError: If a reentrant checkpoint did not take its gradient; after the first steps, if a term sent
                no gradient to the router of a layer.
        """
        self._steps += 1
        for name, kept in self._late.items():
            if any(late.arrived for _, late in kept):
                raise BalancingError(
                    f"reentrant gradient checkpointing did not run layer {name!r} again, so no balancing loss reached "
                    "its router: the layer's input has no gradient. Call model.enable_input_require_grads(), or pass "
                    "use_reentrant=False."
                )
        if self._steps == FIRST_STEPS and self._unproved:
            (term, name), problem = next(iter(self._unproved.items()))
            raise BalancingError(
                f"{term} sent no gradient to the router of layer {name!r} in {FIRST_STEPS} optimizer steps "
                f"({problem}): it cannot balance this layer. Probabilities that are exactly 0 and 1 (a router that "
                "has collapsed and saturated) have none; lower the router's weights, or take the term out."
            )

    def _balance(
        self, decisions: dict[str, tuple[RoutingDecision, Tensor | None]], share: Tensor
    ) -> dict[str, Tensor]:
        experts = {name: self._layers[name].num_experts for name in decisions}
        if self._config.aux_loss_scope == "sequence":
            return {
                name: sequence_balancing_loss(decision, experts[name], self._num_rows(name), mask)
                for name, (decision, mask) in decisions.items()
            }
        counts: dict[str, Tensor | None] = dict.fromkeys(decisions)
        if self._config.aux_loss_scope == "global_batch":
            counts |= self._count(decisions, share)
        return {
            name: load_balancing_loss(decision, experts[name], mask, counts[name])
            for name, (decision, mask) in decisions.items()
        }

    def _count(self, decisions: dict[str, tuple[RoutingDecision, Tensor | None]], share: Tensor) -> dict[str, Tensor]:
        """Assignments of the step so far; of every layer, as another process may run one that this does not."""
        device = next(iter(decisions.values()))[0].scores.device
        counts = {
            name: count_assignments(*decisions[name]).to(device)
            if name in decisions
            else torch.zeros(layer.num_experts, device=device)
            for name, layer in self._layers.items()
        }
        total = self._global_counts.update(list(counts.values()), share)
        return {
            name: layer.to(decisions[name][0].scores.device)
            for name, layer in zip(counts, total, strict=True)
            if name in decisions
        }

    def _num_rows(self, name: str) -> int:
        calls = [event.call for event in self._events[name]]
        shapes = [None if call is None else call.shape for call in calls]
        if None in shapes:
            raise BalancingError(
                "aux_loss_scope='sequence': the model was called without input_ids or inputs_embeds, so the rows of "
                "the batch are not known. Use 'layer' or 'global_batch'."
            )
        lengths = {shape[1] for shape in shapes if shape is not None}
        if len(lengths) > 1:
            raise BalancingError(
                f"aux_loss_scope='sequence': a micro-batch ran forwards of different lengths {sorted(lengths)}. Use "
                "'layer' or 'global_batch'."
            )
        return sum(shape[0] for shape in shapes if shape is not None)

    def _prove(self, by_layer: dict[str, dict[str, Tensor]]) -> None:
        """In the first steps, check that each term's gradient arrives at the logits of each layer."""
        if self._steps >= FIRST_STEPS:
            return
        for term, values in by_layer.items():
            for name, value in values.items():
                if (term, name) in self._proved:
                    continue
                logits = [event.logits for event in self._events[name] if event.logits is not None]
                # the graph between the logits and the term alone: no recomputation, no parameter's .grad
                gradients = torch.autograd.grad(value, logits, retain_graph=True, allow_unused=True)
                sizes = [0.0 if gradient is None else float(gradient.abs().max()) for gradient in gradients]
                if any(0 < size < float("inf") for size in sizes):
                    self._proved.add((term, name))
                    self._unproved.pop((term, name), None)
                else:
                    self._unproved[term, name] = f"largest gradient of its logits: {max(sizes)}"


def _checked_scores(event: Routing, config: BalancingConfig) -> RouterScores:
    """The meaning of the layer's logits; raises if a term cannot be made of them."""
    name, logits = event.layer.name, event.logits
    if logits is None or logits.shape[-1] < event.layer.num_experts:
        raise BalancingError(
            f"the router of layer {name!r} returns no logits of all experts: there is nothing to balance it by. "
            "transformers 5.23 returns them in every family (5.17 not in Granite)."
        )
    if torch.is_grad_enabled():  # else a reentrant checkpoint: `late_gradient` looks
        _refuse_detached(event.layer, logits)
    scores = _scores(event, logits, config)
    if scores is None:
        raise BalancingError(
            f"how the router of layer {name!r} turns logits into weights is not recognised (true of PhiMoE and "
            "Inkling), so the probabilities to balance are not known. Name the rule: "
            "BalancingConfig(scores='softmax')."
        )
    if config.z_loss_coef > 0 and scores.scores == "identity":
        raise BalancingError(
            f"z_loss_coef: the router of layer {name!r} returns probabilities, not logits, so there is nothing to "
            "keep small. Set z_loss_coef to 0."
        )
    return scores


def _refuse_detached(layer: MoeLayer, logits: Tensor) -> None:
    assert layer.router is not None  # checked before training
    trained = [parameter for parameter in layer.router.parameters() if parameter.requires_grad]
    # parameters that FSDP has replaced for the forward are not those of the graph
    if not logits.requires_grad or (trained and not _is_flattened(layer) and not reaches(logits, trained)):
        raise BalancingError(
            f"the logits of layer {layer.name!r} have no gradient to the router: they are detached, or computed "
            "without gradients. A balancing loss would do nothing."
        )


def _scores(event: Routing, logits: Tensor, config: BalancingConfig) -> RouterScores | None:
    if config.scores is not None:
        return RouterScores(config.scores, False, 1.0)
    if _are_probabilities(logits):  # with one expert of weight 1 every rule explains the weights
        return RouterScores("identity", False, 1.0)
    return recognize_scores(logits, event.index, event.weights)


def _is_flattened(layer: MoeLayer) -> bool:
    return "_fsdp_wrapped_module" in layer.name


@torch.no_grad()
def _are_probabilities(logits_TX: Tensor) -> bool:
    values = logits_TX.detach().float()
    return bool((values >= 0).all()) and bool((values.sum(-1) - 1).abs().max() < 1e-2)
