"""Refuse facts of another model, as far as the facts tell."""

from collections.abc import Mapping
from typing import Any

from hf_moe.hub.cards.checkpoint_facts import CheckpointFacts
from hf_moe.hub.cards.facts import CardError, take
from hf_moe.hub.cards.routing_facts import RoutingFacts
from hf_moe.hub.cards.training_facts import TrainingFacts


def refuse_other_results(checkpoint: CheckpointFacts, results: Mapping[str, Any]) -> None:
    """Raises CardError if the results are of another model, or of an adapter's base alone."""
    name, parameters = take(results, "model.name", str), take(results, "model.parameters", int)
    what = f"the evaluation results ({name!r})"
    if take(results, "model.adapter", str) and not checkpoint.is_adapter:
        raise CardError(f"{what} are of the model with an adapter. Name the adapter's folder, or evaluate without it.")
    _compare(what, checkpoint, take(results, "model.model_type", str), parameters)
    if checkpoint.is_adapter and checkpoint.trained and parameters is not None and parameters == checkpoint.total:
        raise CardError(f"{what} are of the base without this adapter. Run hf-moe evaluate with --adapter.")


def refuse_other_training(checkpoint: CheckpointFacts, training: TrainingFacts) -> None:
    """Raises CardError if the report is of another model."""
    what = "the training report"
    _compare(what, checkpoint, training.model_type, training.total)
    _refuse_difference(what, "routers with the SHA-256", training.router_after, checkpoint.router_sha256)
    if checkpoint.is_adapter:
        _refuse_difference(what, "parameters that were trained", training.trained, checkpoint.trained)


def refuse_other_trace(checkpoint: CheckpointFacts, routing: RoutingFacts) -> None:
    """Raises CardError if the trace is of another model."""
    what, model = "the routing trace", routing.model
    _compare(what, checkpoint, take(model, "model_type", str), take(model, "parameters", int))
    _refuse_difference(what, "MoE layers", len(routing.layers) or None, checkpoint.num_moe_layers)


def _compare(what: str, checkpoint: CheckpointFacts, model_type: str | None, parameters: int | None) -> None:
    _refuse_difference(what, "the type", model_type, checkpoint.model_type)
    base, added = checkpoint.total, checkpoint.trained if checkpoint.is_adapter else None
    if parameters is not None and base is not None and not base <= parameters <= base + (added or 0):
        _refuse_difference(what, "parameters", parameters, base + (added or 0))


def _refuse_difference(what: str, quantity: str, theirs: Any, ours: Any) -> None:
    """Raises CardError if both are known and differ."""
    if theirs is not None and ours is not None and theirs != ours:
        raise CardError(
            f"{what} and the checkpoint are of different models: {quantity}: {theirs} and {ours}. Name what belongs "
            "to this checkpoint, and move away a file beside it that does not."
        )
