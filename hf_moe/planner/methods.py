"""The fine-tuning methods, each built on the meta device as the recipes build it: what is trained is then counted.

Base weights are in the dtype of the config. Factors and adapter experts are float32 beside a base of 16 bits, as PEFT
makes them; ESFT and full fine-tuning train the base's own dtype.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_moe.adapters.esft import SelectedExperts
from hf_moe.adapters.expert_selection import ExpertSelection
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.layers.unseen_experts import required_layers
from hf_moe.loading.pretrained import build_empty

# the recipe's default: the chosen experts take this share of a layer's routing
ESFT_BUDGET = 0.2


def expert_lora(config: PreTrainedConfig, r: int) -> nn.Module:
    """PEFT's factors on both projections of every expert, run apart from the weights."""
    from peft import get_peft_model

    from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config

    model = build_empty(config)
    # low_cpu_mem_usage: PEFT would draw the factors on the CPU
    adapted = get_peft_model(model, expert_lora_config(model, r), low_cpu_mem_usage=True)
    accelerate_adapters(adapted)
    return adapted


def adapter_experts(config: PreTrainedConfig) -> nn.Module:
    """Two adapter experts of width 64 in every MoE layer, as the recipe has them unless told otherwise."""
    from peft import get_peft_model

    from hf_moe.adapters.adapter_experts import AdapterExpertsConfig

    model = build_empty(config)
    model.set_experts_implementation("hf_moe_grouped")  # which runs on shapes
    with torch.device("meta"):
        return get_peft_model(model, AdapterExpertsConfig())


def esft(config: PreTrainedConfig, budget: float = ESFT_BUDGET) -> nn.Module:
    """As many experts of every layer as take `budget` of its routing if all are chosen equally often.

    No layer needs more: the busiest `ceil(budget * E)` of E experts take at least `budget`.
    """
    model = build_empty(config)
    layers = required_layers(model)
    experts = {layer.plain_name: range(math.ceil(budget * layer.num_experts)) for layer in layers}
    model.requires_grad_(False)
    for layer, chosen in ExpertSelection.from_experts(model, experts).match(model):
        parent, _, child = layer.called_experts_name.rpartition(".")
        setattr(model.get_submodule(parent), child, SelectedExperts(layer.experts, chosen.experts))
    return model


def full(config: PreTrainedConfig, dtype: torch.dtype | None = None) -> nn.Module:
    """All weights but the routers, in the config's dtype or another."""
    model = build_empty(config).to(dtype)
    for layer in moe_layers(model):
        if layer.router is not None:
            layer.router.requires_grad_(False)
    return model
