"""Nothing is timed before it was compared with float64: the output and every gradient.

The rule is the tests' (`tests/numerics.py`): at most twice as far from the exact result as plain torch in the same
dtype, plus what rounding the exact result costs; in float32, where the order of a sum alone can break that rule, plus
an a-priori bound on a sum's rounding. Gradients of weights are compared for a few experts (the one with the most
rows, the one with the fewest, others by seed): a whole stack in float64 does not fit on every device.

Shape suffixes: T tokens, K slots per token, E experts, N rows of one expert, H hidden, I expert width, R LoRA rank.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Inputs

COMPARED_EXPERTS = 8
RULE = (
    "max|ours - float64| <= 2 * max|plain torch in the same dtype - float64| + eps/2 * max|float64|, in float32 plus "
    "eps * (length of the longest sum) * max|float64|; for the output and every gradient (of weights: for "
    f"{COMPARED_EXPERTS} experts), in every mode, before anything is timed"
)


@dataclass(frozen=True)
class Stacks:
    """The experts' tensors by name, each [E, ...]: `up`, `down`, and with LoRA `up_a`, `up_b`, `down_a`, `down_b`."""

    tensors: Mapping[str, Tensor]
    scale: float = 0.0

    @property
    def trained(self) -> tuple[str, ...]:
        return tuple(self.tensors) if len(self.tensors) == 2 else tuple(self.tensors)[2:]


@dataclass(frozen=True)
class Outcome:
    """`out`, and the gradients asked for: `hidden`, `weights`, and `name[expert]` of a stack."""

    tensors: dict[str, Tensor]


def compared_experts(index_TK: Tensor, num_experts: int) -> list[int]:
    """The experts whose weight gradients are compared: most rows, fewest rows, others by seed."""
    if num_experts <= COMPARED_EXPERTS:
        return list(range(num_experts))
    rows_E = torch.bincount(index_TK.flatten(), minlength=num_experts)
    chosen = {int(rows_E.argmax()), int(rows_E.argmin())}
    others = [expert for expert in range(num_experts) if expert not in chosen]
    return sorted(chosen | set(random.Random(0).sample(others, COMPARED_EXPERTS - len(chosen))))


def plain_torch(inputs: Inputs, stacks: Stacks, dtype: torch.dtype) -> Outcome:
    """One expert after the other in `dtype`, gradients by autograd: the exact result (float64) and the baseline."""
    hidden_TH, index_TK, weights_TK, grad_TH = inputs.to(dtype)
    out = {"out": torch.zeros_like(hidden_TH), "hidden": torch.zeros_like(hidden_TH)}
    out["weights"] = torch.zeros_like(weights_TK)
    num_experts = len(stacks.tensors["up"])
    compared = compared_experts(index_TK, num_experts)
    for expert in range(num_experts):
        token_N, slot_N = torch.where(index_TK == expert)
        rows_NH, weights_N = hidden_TH[token_N].requires_grad_(), weights_TK[token_N, slot_N].requires_grad_()
        own = {name: stack[expert].detach().to(dtype) for name, stack in stacks.tensors.items()}
        trained = stacks.trained if expert in compared else ()
        leaves = [rows_NH, weights_N, *(own[name].requires_grad_() for name in trained)]
        result_NH = _swiglu(rows_NH, own, stacks.scale) * weights_N[:, None]
        to_rows_NH, to_weights_N, *to_own = torch.autograd.grad(result_NH, leaves, grad_TH[token_N])
        out["out"].index_add_(0, token_N, result_NH.detach())
        out["hidden"].index_add_(0, token_N, to_rows_NH)
        out["weights"][token_N, slot_N] = to_weights_N
        out |= {f"{name}[{expert}]": gradient for name, gradient in zip(trained, to_own, strict=True)}
    return Outcome(out)


def _swiglu(rows_NH: Tensor, own: Mapping[str, Tensor], scale: float) -> Tensor:
    def linear(rows: Tensor, name: str) -> Tensor:
        weight = own[name]
        if f"{name}_a" in own:
            weight = weight + scale * own[f"{name}_b"] @ own[f"{name}_a"]
        return F.linear(rows, weight)

    gate_NI, up_NI = linear(rows_NH, "up").chunk(2, dim=-1)
    return linear(F.silu(gate_NI) * up_NI, "down")


@dataclass(frozen=True)
class Judge:
    """Exact result and allowed errors of one size, for one dtype."""

    exact: Outcome
    allowed: dict[str, float]

    @classmethod
    def of(cls, exact: Outcome, baseline: Outcome, longest_sum: int) -> "Judge":
        allowed = {}
        for name, value in exact.tensors.items():
            found = baseline.tensors[name]
            eps = torch.finfo(found.dtype).eps
            chain = longest_sum if found.dtype == torch.float32 else 0
            allowed[name] = 2 * distance(found, value) + eps * (0.5 + chain) * _largest(value)
        return cls(exact, allowed)

    def objection(self, found: Mapping[str, Tensor | None]) -> str | None:
        """Reason why a result is wrong, or None. It may hold fewer tensors than the exact one, not others."""
        for name, value in found.items():
            exact = self.exact.tensors[name]
            if value is None:
                return f"{name}: no gradient"
            if value.shape != exact.shape:
                return f"{name}: shape {tuple(value.shape)}, expected {tuple(exact.shape)}"
            error = distance(value, exact)
            if not error <= self.allowed[name]:  # NaN is an objection too
                return f"{name}: error {error:.3e}, allowed {self.allowed[name]:.3e}"
        return None


def judge(inputs: Inputs, stacks: Stacks, dtype: torch.dtype, exact: Outcome) -> Judge:
    """Allowed errors for implementations in `dtype`, given the float64 result."""
    rows = int(torch.bincount(inputs.index_TK.flatten()).max())
    (_, double_width, hidden_size), slots = stacks.tensors["up"].shape, inputs.index_TK.shape[1]
    longest_sum = max(hidden_size + double_width // 2 + slots, rows)
    return Judge.of(exact, plain_torch(inputs, stacks, dtype), longest_sum)


def distance(values: Tensor, exact: Tensor) -> float:
    """Largest absolute difference, in float64."""
    return _largest(values.to(exact.device).double() - exact)


def _largest(values: Tensor) -> float:
    return values.abs().max().item() if values.numel() else 0.0
