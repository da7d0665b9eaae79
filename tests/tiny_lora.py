"""Tiny models under expert LoRA: PEFT's own as the truth, and the same accelerated."""

import copy

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from tiny_hf_moe import random_ids
from tiny_models import build_tiny
from tiny_moe import hf_moe_model

RANK = 5  # no multiple of anything that a kernel likes


def build(family: str, dtype: torch.dtype = torch.float64, **overrides) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model on transformers' readable implementation, and inputs of its forward."""
    if family == "hf_moe":
        model, inputs = hf_moe_model(**overrides), {"input_ids": random_ids()}
    else:
        model, inputs = build_tiny(family, **overrides)
    model.set_experts_implementation("eager")
    return model.to(dtype), inputs


def fill(model: nn.Module, seed: int = 0, std: float = 0.1) -> nn.Module:
    """Draw every factor, so that adapters do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def adapted(model: nn.Module, **options) -> PeftModel:
    """PEFT's own model on a copy of `model`, with factors that do something."""
    model = copy.deepcopy(model)
    return fill(get_peft_model(model, expert_lora_config(model, **{"r": RANK, **options}))).eval()


def accelerated(model: PeftModel, implementation: str = "hf_moe") -> PeftModel:
    model = copy.deepcopy(model)
    model.get_base_model().set_experts_implementation(implementation)
    accelerate_adapters(model)
    return model


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs)[0]


def results(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first output, and the gradient of everything that is trained."""
    model.zero_grad()
    out = outputs(model, inputs)
    out.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients
    assert all(gradient is not None for gradient in gradients.values())
    return {"out": out.detach(), **gradients}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-11) -> None:
    """Every tensor within `relative` of its largest value: in float64 what rounding alone can do."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference, size = (actual[name] - value).abs().max().item(), value.abs().max().item()
        assert size > 0, name
        assert difference <= relative * size, f"{name}: {difference:.3g}, size {size:.3g}"
