"""Low-rank factors on the experts: PEFT's `W + BA` in front of an implementation, and our op that never builds it.

Shape suffixes: T tokens, K slots per token, E experts, P = 2I pre-activation width, H hidden, I expert width, R rank.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_moe.kernels.layer_call import ExpertForm, ExpertWeights, LayerCall, LowRank, LowRankPair

from .contestants import Forward

LORA_OP = "hf_moe_lora"
RANK, SCALE = 16, 2.0
STACKS = {"gate_up_proj": "up", "down_proj": "down"}


class LoraLayer:
    """An experts module inside of a PEFT model, with random factors in both projections."""

    def __init__(self, experts: Any):
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

    def through_peft(self, name: str) -> tuple[Forward, nn.Module, Callable[[], dict[str, Tensor | None]]]:
        """The implementation `name` on parameters that PEFT computes, the module it trains, its gradients."""
        inner = self.model.base_model.model.experts
        self.experts.requires_grad_(False)
        config = self.experts.config

        def forward(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
            config._experts_implementation = name
            return inner(hidden_TH, index_TK, weights_TK)

        return forward, self.model, lambda: dict(self.factors(lambda parameter: parameter.grad))

    def through_op(self) -> tuple[Forward, nn.Module, Callable[[], dict[str, Tensor | None]]]:
        """`triton_experts_lora` on factors of its own layout."""
        op = importlib.import_module("hf_moe.kernels.triton.ops").triton_experts_lora
        values = self.factors(lambda parameter: parameter.detach())
        own = nn.ParameterDict({name: nn.Parameter(value.contiguous()) for name, value in values.items()})
        up_weight, down_weight = self.experts.gate_up_proj.detach(), self.experts.down_proj.detach()
        weights, form = ExpertWeights(up_weight, None, down_weight, None), ExpertForm("silu")
        up, down = LowRank(own["up_a"], own["up_b"], SCALE), LowRank(own["down_a"], own["down_b"], SCALE)

        def forward(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
            num_ids, low_rank = len(up_weight), LowRankPair(up, down)
            return op(LayerCall(hidden_TH, index_TK, weights_TK, weights, num_ids, form, low_rank))

        module = nn.ModuleList([own, self.experts])
        return forward, module, lambda: {name: own[name].grad for name in values}


def lora_op_absent() -> str | None:
    """Reason why `LORA_OP` cannot be called here, or None."""
    try:
        ops = importlib.import_module("hf_moe.kernels.triton.ops")
    except ImportError as error:
        return f"hf_moe.kernels.triton.ops cannot be imported: {error}"
    return None if hasattr(ops, "triton_experts_lora") else "hf_moe.kernels.triton.ops has no triton_experts_lora"
