"""Tiny models of several families whose routers are made to collapse, and the routing seen from outside."""

from collections.abc import Sequence

import torch
from torch import nn

from hf_moe.layers.moe_layers import MoeLayer, moe_layers
from hf_moe.layers.watch_routing import watch_routing
from hf_moe.observability.layer_statistics import LayerStatistics
from tiny_models import VOCAB, build_tiny
from tiny_moe import hf_moe_model

FAMILIES = ("olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "hf_moe")


def tiny(family: str):
    """A tiny model whose hidden states have one large common component, as those of trained models do."""
    if family == "hf_moe":
        model = hf_moe_model(vocab_size=VOCAB, num_hidden_layers=3)
    else:
        model, _ = build_tiny(family)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight += torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1))
        for layer in moe_layers(model):
            layer.router.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
            # without the common component every expert is chosen by some tokens
            common = _inputs(model, layer).mean(0)
            rows = layer.router.weight
            rows -= torch.outer(rows @ common, common) / common.square().sum()
    return model


def tokens(rows: int = 16, length: int = 32) -> torch.Tensor:
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def steer(model: nn.Module, targets: Sequence[Sequence[int]], logit: float) -> None:
    """Raise (or lower) the router logit of these experts for all tokens, by layer.

    Args:
        logit: In standard deviations of the logits that a token's experts have.
    """
    for layer, experts in zip(moe_layers(model), targets, strict=True):
        inputs = _inputs(model, layer)
        common = inputs.mean(0)
        rows = layer.router.weight - torch.outer(layer.router.weight @ common, common) / common.square().sum()
        unit = float((inputs @ rows.T).std())
        for expert in experts:
            layer.router.weight[expert] += logit * unit * common / common.square().sum()


def neighbours(first: int) -> tuple[int, int]:
    """Two experts of one group, for routers that are limited to groups."""
    return (first, first + 1)


@torch.no_grad()
def observe(model: nn.Module, ids: torch.Tensor) -> list[LayerStatistics]:
    """Statistics straight from the decisions, without the code that records traces."""
    heard = []
    with watch_routing(model, heard.append):
        model(input_ids=ids)
    found = []
    for event in heard:
        one_hot = nn.functional.one_hot(event.index, event.layer.num_experts + 1)[..., :-1]
        found.append(
            LayerStatistics(
                event.layer.plain_name,
                event.layer.num_experts,
                event.layer.top_k,
                tokens=len(event.index),
                counts=one_hot.sum((0, 1)),
                weight_mass=(one_hot * event.weights.double()[..., None]).sum((0, 1)),
            )
        )
    return found


@torch.no_grad()
def _inputs(model: nn.Module, layer: MoeLayer) -> torch.Tensor:
    seen = []
    hook = layer.router.register_forward_pre_hook(lambda router, args: seen.append(args[0]))
    model(input_ids=tokens())
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])
