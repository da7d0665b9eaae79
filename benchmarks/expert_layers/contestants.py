"""Contestants: transformers' implementations and ours by name, peers where they are installed, and floors.

Shape suffixes: T tokens, K slots per token, H hidden, I expert width.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe.experts import backends, own_backends
from hf_moe.experts.backends import BACKENDS
from hf_moe.experts.request import request_for
from hf_moe.layers.storage import storage_of

from .cases import DECODE, FORWARD, FROZEN, LORA, TRAIN, Case, Layer

# [T, H], [T, K], [T, K] -> [T, H]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]

NATIVES = ("eager", "batched_mm", "grouped_mm")
HF_MOE = "hf_moe"
OURS = (HF_MOE, "hf_moe_cpu", "hf_moe_triton", "hf_moe_grouped", "hf_moe_reference")
DENSE, STREAM = "dense floor", "streaming floor"
FLOORS = {
    DENSE: "a dense SwiGLU MLP of width top_k * I, which needs as many FLOPs, timed in the same rounds",
    STREAM: "reading as many bytes as the experts hit hold, once, from memory (a dot product), timed in the same "
    "rounds; forward only",
}
PEERS = {"liger": "liger_kernel", "scattermoe": "scattermoe"}
# tensor libraries raise all of these for a dtype, a device or a size that they do not run
ERRORS: tuple[type[Exception], ...] = (ValueError, NotImplementedError, ImportError, KeyError, RuntimeError)
if importlib.util.find_spec("triton") is not None:  # too much shared memory, ptxas: a plain Exception
    ERRORS += (importlib.import_module("triton.errors").TritonError,)
COPY_LIMIT = 2 << 30
DENSE_GRADIENT_LIMIT = 8 << 30
REFERENCE_LIMIT = 512
# cuBLAS counts in 32 bits
MOST_VALUES_OF_A_DOT = 1 << 30
SKIPPED = {
    "batched_mm": f"it copies the weights of every row (T * K * bytes of an expert, three times for training); "
    f"skipped above {COPY_LIMIT >> 30} GiB",
    "eager": "with trained experts its backward writes a gradient of all experts for each expert that is hit; "
    f"skipped above {DENSE_GRADIENT_LIMIT >> 30} GiB",
    "hf_moe_reference": f"as eager; and above {REFERENCE_LIMIT} tokens: it defines what is right, it does not compete",
    "hf_moe_grouped": f"above {REFERENCE_LIMIT} tokens where hf_moe runs hf_moe_cpu: its second choice is not needed",
    "what hf_moe runs": "timed once, as hf_moe",
}


def contestant_names(device: str) -> list[str]:
    """Everyone who may compete on `device`, present or not; natives first."""
    return [*NATIVES, *OURS, *(["sonicmoe", "deepgemm", *PEERS] if device == "cuda" else [])]


def absent(names: list[str]) -> dict[str, str]:
    """Those of `names` that cannot be called here, with the reason."""
    reasons = {}
    for name in names:
        if name in PEERS:
            if importlib.util.find_spec(PEERS[name]) is None:
                reasons[name] = f"the package `{PEERS[name]}` is not installed"
        elif name != "eager" and name not in ALL_EXPERTS_FUNCTIONS:
            reasons[name] = "not registered in transformers' ExpertsInterface"
    return reasons


def skip_reason(name: str, case: Case, experts_hit: int) -> str | None:
    """Reason why `name` is not even tried: memory or time out of proportion, by the rules of `SKIPPED`."""
    expert_bytes = case.layer.expert_values * case.torch_dtype.itemsize
    trains_experts = case.mode == TRAIN
    if name == "batched_mm":
        copied = case.tokens * case.layer.top_k * expert_bytes * (1 if case.mode in (FORWARD, DECODE) else 3)
        if copied > COPY_LIMIT:
            return f"copies {copied / 2**30:.1f} GiB of weights, the limit is {COPY_LIMIT >> 30} GiB"
    if name == "hf_moe_reference" and case.tokens > REFERENCE_LIMIT:
        return f"not timed above {REFERENCE_LIMIT} tokens"
    if name in ("eager", "hf_moe_reference") and trains_experts:
        written = experts_hit * case.layer.num_experts * expert_bytes
        if written > DENSE_GRADIENT_LIMIT:
            limit = DENSE_GRADIENT_LIMIT >> 30
            return f"writes {written / 2**30:.1f} GiB of dense gradients, the limit is {limit} GiB"
    if name in PEERS and case.mode == LORA:
        return "has no low-rank path of its own; PEFT's W + BA in front of it is what grouped_mm shows"
    return None


def is_ours(name: str) -> bool:
    return name.startswith("hf_moe")


def refusal(name: str, experts: Any, case: Case) -> str | None:
    """What the implementation itself says against running `experts`."""
    row = BACKENDS.get(name)
    return backends.refusal(row, request_for(experts, storage_of(experts))) if row else None


def chosen(experts: Any, case: Case) -> dict[str, str]:
    """The backend that `hf_moe` runs, and the reason."""
    request = request_for(experts, storage_of(experts), adapted=case.mode == LORA)
    rows, facts = case.tokens * case.layer.top_k, (request.dtype, request.device, request.adapted)
    many_rows = own_backends.has_many_rows(rows, case.layer.num_experts, *facts)
    choice = backends.choose(request._replace(many_rows=many_rows))
    return {"runs": choice.name, "because": choice.reason}


def forward_by_name(name: str, experts: Any) -> Forward:
    """`experts` run by the implementation `name`: through transformers' interface, or a peer's own function."""
    if name in PEERS:
        return {"liger": _liger, "scattermoe": _scattermoe}[name](experts)
    config = experts.config

    def forward(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        config._experts_implementation = name
        return experts(hidden_TH, index_TK, weights_TK)

    return forward


def _liger(experts: Any) -> Forward:
    """Source: liger-kernel 0.8.5, `transformers/swiglu.py::LigerExperts`."""
    function = importlib.import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction

    def forward(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return function.apply(hidden_TH, experts.gate_up_proj, experts.down_proj, index_TK.int(), weights_TK)

    return forward


def _scattermoe(experts: Any) -> Forward:
    """Source: scattermoe at 2d15f31, `mlp.py::GLUMLP` (which holds [up; gate]) over `parallel_linear`."""
    package = importlib.import_module("scattermoe.parallel_experts")

    def forward(hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        order = package.flatten_sort_count(index_TK, num_experts=len(experts.down_proj))
        top_k = index_TK.shape[1]
        up_weight, down_weight = experts.gate_up_proj.permute(0, 2, 1), experts.down_proj.permute(0, 2, 1)
        gate, up = package.parallel_linear(hidden_TH, up_weight, top_k, *order, grouped_out=True).chunk(2, dim=-1)
        return package.parallel_linear(F.silu(gate) * up, down_weight, 1, *order, grouped_in=True, gates=weights_TK)

    return forward


class DenseMlp(nn.Module):
    """The floor: as many FLOPs as `top_k` experts a token, in two large products."""

    def __init__(self, layer: Layer, dtype: torch.dtype, device: str):
        super().__init__()
        width = layer.top_k * layer.width
        generator = torch.Generator(device).manual_seed(0)

        def weight(rows: int, columns: int) -> nn.Parameter:
            values = torch.randn(rows, columns, generator=generator, device=device) / columns**0.5
            return nn.Parameter(values.to(dtype))

        self.gate_up_proj = weight(2 * width, layer.hidden_size)
        self.down_proj = weight(layer.hidden_size, width)

    def forward(self, hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        gate, up = F.linear(hidden_TH, self.gate_up_proj).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj)


def streaming(nbytes: int, device: str) -> Callable[[], object]:
    """Reads `nbytes` of memory once."""
    halves = torch.ones(2, max(nbytes // 8, 1), device=device).split(MOST_VALUES_OF_A_DOT, dim=1)
    return lambda: [torch.dot(left, right) for left, right in halves]


def wants_gradients(mode: str) -> bool:
    return mode in (TRAIN, FROZEN, LORA)
