"""Mixture-of-Experts blocks that do not go through transformers' experts interface, and a sentence that names them.

Llama 4, Switch, NLLB-MoE, DBRX, JetMoe, LongCat-Flash, Doge and Step 3.7 (transformers 5.23) compute their experts
themselves, as most code from the Hub does: no backend can be chosen for them, and `moe_layers` does not find them.
Whoever needs MoE layers takes them from `required_layers`, which tells such a model from a dense one.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_moe.layers.moe_layers import MoeLayer, inner_model, is_experts, moe_layers, recorded_routers
from hf_moe.layers.path_ranges import join_ranges
from hf_moe.models.configuration_hf_moe import EXPERT_COUNTS


def required_layers(model: nn.Module, *, dense: str = "Pass a Mixture-of-Experts model.") -> list[MoeLayer]:
    """`moe_layers(model)`, at least one.

    Args:
        dense: The way out for a model that has no experts at all.

    Raises:
        ValueError: If there is none; says whether the model is dense or its experts cannot be seen.
    """
    layers = moe_layers(model)
    if not layers:
        name = type(inner_model(model)).__name__
        raise ValueError(unseen_experts(model, layers) or f"{name} has no MoE layer. {dense}")
    return layers


def unseen_experts(model: nn.Module, layers: list[MoeLayer]) -> str | None:
    """A sentence about routers and experts of `model` that are not in `layers`; None if there are none."""
    inner = inner_model(model)
    if paths := _strangers(model, layers):
        return (
            f"{type(inner).__name__} has experts outside of transformers' experts interface "
            f"({join_ranges(paths)}): hf_moe does not see them, so it can neither count, trace nor train them, and "
            "choose no backend for them."
        )
    config = getattr(inner, "config", None)
    if not layers and isinstance(config, PreTrainedConfig) and (fields := _expert_counts(config.to_dict())):
        return (
            f"{type(inner).__name__} has no MoE layer that hf_moe sees, although its config says {fields}: "
            "either it is built dense, or its experts do not go through transformers' experts interface."
        )
    return None


def _strangers(model: nn.Module, layers: list[MoeLayer]) -> list[str]:
    """Paths of recorded routers, and of children called `experts`, that belong to no known layer."""
    known: set[int] = set()
    for layer in layers:
        known.update(id(module) for module in model.get_submodule(layer.name).modules())
    recorded = recorded_routers(model)
    routers = [path for path, module in recorded.items() if not any(id(inner) in known for inner in module.modules())]
    blocks = {path.rpartition(".")[0] for path in routers}
    experts = [
        path
        for path, module in model.named_modules()
        if path.split(".")[-1] == "experts"
        and not any(id(inner) in known or is_experts(inner) for inner in module.modules())
        and path.rpartition(".")[0] not in blocks
    ]
    return [*routers, *(path for path in experts if not any(router.startswith(f"{path}.") for router in routers))]


def _expert_counts(fields: dict[str, Any]) -> str:
    found = [f"{key}={value}" for key, value in fields.items() if key in EXPERT_COUNTS and _is_many(value)]
    nested = [_expert_counts(value) for value in fields.values() if isinstance(value, dict)]
    return ", ".join(dict.fromkeys(part for part in [*found, *nested] if part))


def _is_many(value: Any) -> bool:
    return isinstance(value, int) and value > 1
