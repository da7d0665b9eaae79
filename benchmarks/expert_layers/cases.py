"""Cases to measure: layers of real families, token counts, routings, dtypes and modes.

Shape suffixes: T tokens, K slots per token, E experts, H hidden, I expert width, R LoRA rank.
"""

import importlib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FORWARD, TRAIN, FROZEN, LORA, DECODE = "forward", "train", "frozen", "lora", "decode"
MODES = {
    FORWARD: "forward under no_grad",
    TRAIN: "forward and backward, everything trained: gradients of rows, routing weights and experts",
    FROZEN: "forward and backward with frozen experts: gradients of rows and routing weights",
    LORA: "forward and backward with frozen experts and trained low-rank factors on both projections of PEFT: "
    "ours after accelerate_adapters, others through PEFT's own W + BA",
    DECODE: "forward under no_grad, replayed as a CUDA graph",
}
# the experts class of a family, its configuration, and the field that holds the experts' width
FAMILIES = {
    "qwen3_moe": ("Qwen3MoeExperts", "Qwen3MoeConfig", "moe_intermediate_size", "num_experts"),
    "mixtral": ("MixtralExperts", "MixtralConfig", "intermediate_size", "num_local_experts"),
    "olmoe": ("OlmoeExperts", "OlmoeConfig", "intermediate_size", "num_experts"),
    "deepseek_v3": ("DeepseekV3Experts", "DeepseekV3Config", "moe_intermediate_size", "n_routed_experts"),
}
ZIPF_EXPONENT = 1.0


@dataclass(frozen=True)
class Layer:
    """One experts module: SwiGLU, gate and up concatenated, as all of `FAMILIES` have it."""

    name: str
    family: str
    hidden_size: int
    width: int
    num_experts: int
    top_k: int

    @property
    def expert_values(self) -> int:
        return 3 * self.hidden_size * self.width

    def flops(self, tokens: int) -> int:
        """Of one forward."""
        return 2 * tokens * self.top_k * self.expert_values


@dataclass(frozen=True)
class Case:
    """One comparison: every implementation on the same tensors."""

    layer: Layer
    tokens: int
    dtype: str
    mode: str
    routing: str = "uniform"

    @property
    def key(self) -> str:
        return f"{self.layer.name} E={self.layer.num_experts} T={self.tokens} {self.dtype} {self.mode} {self.routing}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Inputs(NamedTuple):
    """Inputs of a layer and the gradient of its output; values are exact in bfloat16."""

    hidden_TH: Tensor
    index_TK: Tensor
    weights_TK: Tensor
    grad_TH: Tensor

    def to(self, dtype: torch.dtype) -> "Inputs":
        return Inputs(self.hidden_TH.to(dtype), self.index_TK, self.weights_TK.to(dtype), self.grad_TH.to(dtype))


@dataclass(frozen=True)
class Plan:
    """A list of cases, ordered so that what cases share (weights, exact result) is next to each other."""

    name: str
    device: str
    cases: tuple[Case, ...]
    case_seconds: float


def cpu_plan() -> Plan:
    layers = [Layer("h1024-i512", "qwen3_moe", 1024, 512, num_experts, 8) for num_experts in (8, 64, 128)]
    sizes = [(layer, tokens, "uniform") for layer in layers for tokens in (1, 16, 64, 512, 2048, 4096)]
    sizes.append((layers[1], 512, "zipf"))
    cases = tuple(
        Case(layer, tokens, dtype, mode, routing)
        for layer, tokens, routing in sorted(sizes, key=lambda size: size[0].num_experts)
        for dtype in ("float32", "bfloat16")
        for mode in (FORWARD, TRAIN, FROZEN)
    )
    return Plan("experts_cpu", "cpu", cases, case_seconds=3.0)


def cuda_plan() -> Plan:
    layers = [
        Layer("Qwen3-30B-A3B", "qwen3_moe", 2048, 768, 128, 8),
        Layer("OLMoE-1B-7B", "olmoe", 2048, 1024, 64, 8),
        Layer("Mixtral-8x7B", "mixtral", 4096, 14336, 8, 2),
        Layer("DeepSeek-V3", "deepseek_v3", 7168, 2048, 256, 8),
    ]
    cases = []
    for layer in layers:
        cases += [Case(layer, batch, "bfloat16", DECODE) for batch in (1, 4, 16, 64)]
        cases += [Case(layer, 8192, "bfloat16", mode) for mode in (FORWARD, TRAIN, FROZEN, LORA)]
    cases += [Case(layers[0], 8192, "bfloat16", mode, "zipf") for mode in (FORWARD, TRAIN)]
    return Plan("experts_cuda", "cuda", tuple(cases), case_seconds=2.0)


def quick(plan: Plan) -> Plan:
    """The same kinds of cases at sizes that take seconds in all."""
    cases = []
    for case in plan.cases:
        layer = Layer("tiny", case.layer.family, 64, 32, 4, 2)
        cases.append(Case(layer, min(case.tokens, 16), case.dtype, case.mode, case.routing))
    return Plan(plan.name, plan.device, tuple(dict.fromkeys(cases)), case_seconds=0.02)


def build_experts(layer: Layer, dtype: torch.dtype, device: str) -> nn.Module:
    """The family's own experts module with random weights that are exact in bfloat16; the same for every dtype."""
    class_name, config_name, width_field, experts_field = FAMILIES[layer.family]
    folder = f"transformers.models.{layer.family}"
    config_class = getattr(importlib.import_module(f"{folder}.configuration_{layer.family}"), config_name)
    experts_class = getattr(importlib.import_module(f"{folder}.modeling_{layer.family}"), class_name)
    sizes: dict[str, Any] = {width_field: layer.width, experts_field: layer.num_experts}
    config = config_class(hidden_size=layer.hidden_size, num_experts_per_tok=layer.top_k, **sizes)
    with torch.device(device):
        experts = experts_class(config).to(dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in (experts.gate_up_proj, experts.down_proj):
            for matrix in weight:  # one expert at a time: no float32 copy of a whole stack
                values = torch.randn(matrix.shape, generator=generator, device=device) / math.sqrt(matrix.shape[1])
                matrix.copy_(values.bfloat16())
    return experts


def build_inputs(layer: Layer, tokens: int, routing: str, device: str) -> Inputs:
    """Float32 inputs; `routing` is 'uniform', or 'zipf': expert e is chosen with a probability like 1 / (e + 1)."""
    generator = torch.Generator().manual_seed(tokens)
    popularity_E = torch.ones(layer.num_experts)
    if routing == "zipf":
        popularity_E = torch.arange(1, layer.num_experts + 1).float() ** -ZIPF_EXPONENT
    index = torch.multinomial(popularity_E.expand(tokens, -1), layer.top_k, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().float()

    hidden, grad_out = normal(tokens, layer.hidden_size), normal(tokens, layer.hidden_size)
    weights = normal(tokens, layer.top_k).softmax(-1).bfloat16().float()
    return Inputs(*(tensor.to(device) for tensor in (hidden, index, weights, grad_out)))
