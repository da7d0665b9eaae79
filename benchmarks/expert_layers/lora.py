"""Low-rank factors on the experts as users run them: through stock PEFT (`W + BA`), and after `accelerate_adapters`.

Shape suffixes: T tokens, K slots per token, E experts, P = 2I pre-activation width, H hidden, I expert width, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_moe.adapters.expert_lora import accelerate_adapters
from hf_moe.experts.backends import BACKENDS

from .contestants import Forward

RANK, SCALE = 16, 2.0
STACKS = {"gate_up_proj": "up", "down_proj": "down"}


def takes_factors(name: str) -> bool:
    """Whether adapters on the implementation `name` are accelerated; on others they run through stock PEFT."""
    return name in BACKENDS and BACKENDS[name].takes_low_rank


class LoraLayer:
    """An experts module inside of a PEFT model, with random factors in both projections; the same ones in each."""

    def __init__(self, experts: Any, *, accelerated: bool):
        around: Any = nn.Module()
        around.experts = experts
        config = LoraConfig(
            r=RANK, lora_alpha=RANK * SCALE, target_modules=[], target_parameters=[f"experts.{at}" for at in STACKS]
        )
        self.experts = experts
        # adapters in the dtype of the experts, as in bfloat16 training
        self.model: Any = get_peft_model(around, config, autocast_adapter_dtype=False)
        self._wrappers = {STACKS[m.parameter_name]: m for m in self.model.modules() if hasattr(m, "parameter_name")}
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for wrapper in self._wrappers.values():
                for factor in (wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight):
                    values = torch.randn(factor.shape, generator=generator) / factor.shape[1] ** 0.5
                    factor.copy_(values.bfloat16())
        if accelerated:
            accelerate_adapters(self.model)

    def factors(self, of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """`up_a` [E, R, H], `up_b` [E, P, R], `down_a` [E, R, I], `down_b` [E, H, R]: `of` every factor.

        PEFT holds A as [E * R, in], the expert slowest, and B as [out, R * E], the expert fastest.
        """
        num_experts = len(self.experts.down_proj)
        found = {}
        for name, wrapper in self._wrappers.items():
            a, b = of(wrapper.lora_A["default"].weight), of(wrapper.lora_B["default"].weight)
            found[f"{name}_a"] = a.reshape(num_experts, RANK, a.shape[1])
            found[f"{name}_b"] = b.reshape(len(b), RANK, num_experts).permute(2, 0, 1)
        return {name: found[name] for name in ("up_a", "up_b", "down_a", "down_b")}

    def run_by(self, name: str) -> tuple[Forward, nn.Module, Callable[[], dict[str, Tensor | None]]]:
        """The adapted experts on the implementation `name`, the module that is trained, its gradients."""
        inner = self.model.base_model.model.experts
        self.experts.requires_grad_(False)
        config = self.experts.config

        def forward(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
            config._experts_implementation = name
            return inner(hidden_TH, index_TK, weights_TK)

        return forward, self.model, lambda: dict(self.factors(lambda parameter: parameter.grad))
