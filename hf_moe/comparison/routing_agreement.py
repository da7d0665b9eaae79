"""Agreement of a model's routing of fixed tokens before and after training.

Freezing the router does not freeze the routing: the hidden states that it reads move.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_moe.layers.watch_routing import Routing, watch_routing


@dataclass(frozen=True)
class RoutingChoices:
    """Experts chosen for every token of some fixed rows; `record_choices` makes one.

    Attributes:
        names: Of the MoE layers that ran, in the model's order.
        experts: Per layer int64 of shape (tokens, top_k): row t holds the ids of the experts of token t, in increasing
            order; tokens are in the order of the flattened rows.
    """

    names: tuple[str, ...]
    experts: tuple[Tensor, ...]


@torch.no_grad()
def record_choices(model: nn.Module, rows: Tensor, *, batch_size: int = 8) -> RoutingChoices:
    """Run token rows of shape (rows, length), without padding, through the model in eval mode, and record the choices.

    Raises:
        ValueError, TypeError: As `watch_routing`.
    """
    chosen: dict[str, list[Tensor]] = {}

    def keep(routing: Routing) -> None:
        chosen.setdefault(routing.layer.name, []).append(routing.index.cpu())

    was_training = model.training
    model.eval()
    try:
        with watch_routing(model, keep) as layers:
            for batch in rows.split(batch_size):
                model(input_ids=batch.long(), use_cache=False)
    finally:
        model.train(was_training)
    # experts of another tower do not run on text
    names = tuple(layer.name for layer in layers if layer.name in chosen)
    return RoutingChoices(names, tuple(torch.cat(chosen[name]).sort(-1).values for name in names))


def routing_agreement(before: RoutingChoices, after: RoutingChoices) -> list[float]:
    """Share of the tokens whose set of chosen experts is the same, per layer, from 0 to 1.

    Raises:
        ValueError: If the two were not recorded on the same tokens of the same architecture.
    """
    shapes = [[tuple(experts.shape) for experts in choices.experts] for choices in (before, after)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"routing choices must come from the same tokens and layers, got shapes {shapes[0]} and {shapes[1]}. "
            "Record both with the same rows."
        )
    pairs = zip(before.experts, after.experts, strict=True)
    return [float((one == two).all(-1).double().mean()) for one, two in pairs]
