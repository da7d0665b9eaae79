"""What "correct" means in the tests: named routings, and bounds on the distance to the float64 reference.

Two rules. In bfloat16 and float16 an implementation may be at most twice as far from the exact result as plain torch
in the same dtype (`assert_as_good_as`). In float32 the order of a sum alone can break that rule, so an a-priori
rounding bound is used instead (`block_bounds`), sharp enough there to catch a single token sent to a wrong expert.

Shape suffixes: T tokens, E experts, X candidates (experts and null experts), K slots, H hidden size, I expert width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe import reference

MAX_SILU_SLOPE = 1.1  # of silu: |silu(x)| <= |x| and |silu'(x)| < 1.0999


@dataclass(frozen=True)
class ExpertsCase:
    """Arguments of an experts module: hidden [T, H], index and weights [T, K], gate_up [E, 2I, H], down [E, H, I]."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor

    def to(self, dtype: torch.dtype) -> "ExpertsCase":
        cast = {name: getattr(self, name).to(dtype) for name in ("hidden", "weights", "gate_up", "down")}
        return replace(self, **cast)


def _random_case(tokens: int, num_experts: int, slots: int, hidden_size: int = 16, width: int = 24) -> ExpertsCase:
    """Distinct random experts per token, weights that add up to 1. Values are exact in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().float()

    index = torch.rand(tokens, num_experts, generator=generator).argsort(-1)[:, :slots]
    weights = normal(tokens, slots).softmax(-1).bfloat16().float()
    gate_up = (normal(num_experts, 2 * width, hidden_size) / math.sqrt(hidden_size)).bfloat16().float()
    down = (normal(num_experts, hidden_size, width) / math.sqrt(width)).bfloat16().float()
    return ExpertsCase(normal(tokens, hidden_size), index, weights, gate_up, down)


def _one_expert_takes_all() -> ExpertsCase:
    case = _random_case(17, 4, 1)
    return replace(case, index=torch.full_like(case.index, 2))


def _balanced() -> ExpertsCase:
    case = _random_case(16, 4, 2)
    return replace(case, index=torch.arange(32).view(16, 2) % 4)


def _last_expert_empty() -> ExpertsCase:
    case = _random_case(16, 4, 2)
    return replace(case, index=_random_case(16, 3, 2).index)


def _repeated_indices() -> ExpertsCase:
    case = _random_case(9, 4, 2)
    return replace(case, index=case.index[:, :1].repeat(1, 2))


def _sentinels() -> ExpertsCase:
    case = _random_case(12, 4, 2)
    index, weights = case.index.clone(), case.weights.clone()
    skipped = torch.zeros_like(index, dtype=torch.bool)
    skipped[::3, 1] = True
    skipped[1] = True  # a token that no expert computes
    return replace(case, index=index.masked_fill(skipped, 4), weights=weights.masked_fill(skipped, 0.0))


def _nan_token() -> ExpertsCase:
    case = _random_case(8, 4, 2)
    hidden = case.hidden.clone()
    hidden[3] = float("nan")
    return replace(case, hidden=hidden)


ROUTINGS: dict[str, Callable[[], ExpertsCase]] = {
    "balanced": _balanced,
    "one_expert_takes_all": _one_expert_takes_all,
    "last_expert_empty": _last_expert_empty,
    "no_tokens": lambda: _random_case(0, 4, 2),
    "one_token": lambda: _random_case(1, 4, 2),
    "every_expert": lambda: _random_case(7, 4, 4),
    "one_expert": lambda: _random_case(7, 1, 1),
    "repeated_indices": _repeated_indices,
    "odd_sizes": lambda: _random_case(15, 5, 3, hidden_size=20, width=12),
    "sentinels": _sentinels,
    "nan_token": _nan_token,
}


def plain_experts(
    hidden_TH: Tensor, index_TK: Tensor, weights_TK: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor
) -> Tensor:
    """Plain torch, one expert after the other: the baseline of the 2x rule."""
    out_TH = torch.zeros_like(hidden_TH)
    for expert in range(len(gate_up_EJH)):
        token_N, slot_N = torch.where(index_TK == expert)
        gate_NI, up_NI = F.linear(hidden_TH[token_N], gate_up_EJH[expert]).chunk(2, dim=-1)
        out_NH = F.linear(F.silu(gate_NI) * up_NI, down_EHI[expert]) * weights_TK[token_N, slot_N, None]
        out_TH = out_TH.index_add(0, token_N, out_NH.to(out_TH.dtype))
    return out_TH


def assert_as_good_as(actual: Tensor, baseline: Tensor, exact: Tensor) -> None:
    """`max|actual - exact| <= 2 * max|baseline - exact| + floor`, for 16-bit dtypes and many elements.

    `baseline` is plain torch in the dtype of `actual`, `exact` is float64. The floor is half a unit in the last place
    of the largest exact value: what rounding the exact result to the dtype costs.
    """
    assert actual.dtype == baseline.dtype, (actual.dtype, baseline.dtype)
    assert actual.dtype in (torch.bfloat16, torch.float16), f"use an a-priori bound for {actual.dtype}"
    assert exact.dtype == torch.float64, exact.dtype
    _assert_same_nan(actual, exact)
    if not exact.numel():
        return
    error = _largest(actual.double() - exact)
    allowed = 2 * _largest(baseline.double() - exact) + torch.finfo(actual.dtype).eps / 2 * _largest(exact)
    assert error <= allowed, f"error {error:.3e} is more than {allowed:.3e} (twice plain torch's, plus rounding)"


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor, what: str = "result") -> None:
    """`|actual - exact| <= bound`, element by element; NaN only where `exact` has it."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    _assert_same_nan(actual, exact)
    excess = ((actual.double() - exact).abs() - bound).nan_to_num(-1.0)
    worst = excess.max().item() if excess.numel() else -1.0
    ratio = ((actual.double() - exact).abs() / bound).nan_to_num(0.0)
    assert worst <= 0, f"{what}: the error is {ratio.max().item():.3g} times the bound"


def _largest(values: Tensor) -> float:
    return values.nan_to_num(0.0).abs().max().item()


def _assert_same_nan(actual: Tensor, exact: Tensor) -> None:
    assert torch.equal(actual.isnan(), exact.isnan()), "NaN in other places than in the exact result"


def experts_bound(case: ExpertsCase, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """`|ours - exact|` of SwiGLU experts in `dtype` with float32 accumulation, from the same rounded inputs [T, H]."""
    size = absolute_experts(case)
    (tokens, hidden_size), slots, width = case.hidden.shape, case.index.shape[1], case.down.shape[2]
    info = torch.finfo(dtype)
    largest = case.hidden.nan_to_num(0.0).abs().max().item() if tokens else 0.0
    relative = 7 * info.eps + (2.1 * hidden_size + width + slots) * torch.finfo(torch.float32).eps
    underflow = (2 * hidden_size + width + slots + 4) * info.smallest_normal * (1 + largest) ** 2
    return relative * size + slots * info.eps * exact.abs() + underflow


def absolute_experts(case: ExpertsCase) -> Tensor:
    """The experts' output with every term of every sum made positive: what rounding errors are relative to [T, H]."""
    absolute = [getattr(case, name).double().abs() for name in ("hidden", "weights", "gate_up", "down")]
    hidden, weights, gate_up, down = absolute
    return reference.experts(hidden, case.index, weights, gate_up, down, _absolute_silu)


def _absolute_silu(x: Tensor) -> Tensor:
    return MAX_SILU_SLOPE * x


@dataclass(frozen=True)
class BlockBounds:
    """Bounds on the float32 error of an MoE block's output and of the gradients of `(output * cotangent).sum()`."""

    out: Tensor
    weights_TK: Tensor
    gradients: dict[str, Tensor]


def block_bounds(
    hidden_TH: Tensor,
    weights: reference.MoeWeights,
    spec: reference.RouterSpec,
    decision: reference.Route,
    cotangent_TH,
) -> BlockBounds:
    """First-order rounding bounds in float32, given that the choice of experts is the exact one.

    A sum of n rounded products is off by at most n * u times the sum of their absolute values. The absolute values
    come from running the block, forward and backward, on the absolute values of its inputs; n is the longest chain of
    operations; and an error of the logits (H * u * |x||W|) is an error of the scores relative to them, twice because
    of the softmax's denominator.
    """
    u = torch.finfo(torch.float32).eps / 2
    leaves = {"hidden": hidden_TH, "gate_up_proj": weights.gate_up_proj, "down_proj": weights.down_proj}
    leaves["weights"] = decision.weights_TK
    if weights.shared is not None:
        leaves |= dict(zip(("shared_gate", "shared_up", "shared_down"), weights.shared, strict=True))
    leaves = {name: leaf.detach().double().abs().requires_grad_() for name, leaf in leaves.items()}
    out_TH = reference.experts(
        leaves["hidden"],
        decision.index_TK,
        leaves["weights"],
        leaves["gate_up_proj"],
        leaves["down_proj"],
        _absolute_silu,
    )
    if weights.shared is not None:
        shared = [leaves[name] for name in ("shared_gate", "shared_up", "shared_down")]
        out_TH = out_TH + reference.mlp(leaves["hidden"], *shared, _absolute_silu)
    sizes = dict(
        zip(leaves, torch.autograd.grad(out_TH, list(leaves.values()), cotangent_TH.double().abs()), strict=True)
    )

    logit_TX = _absolute_logit_gradient(decision, sizes.pop("weights"), spec)
    absolute_router_XH = weights.router.detach().double().abs()
    sizes["hidden"] = sizes["hidden"] + logit_TX @ absolute_router_XH
    sizes["router"] = logit_TX.T @ leaves["hidden"].detach()

    (tokens, hidden_size), width = hidden_TH.shape, weights.down_proj.shape[2]
    shared_width = weights.shared[0].shape[0] if weights.shared is not None else 0
    chain = 4 * hidden_size + 3 * (width + shared_width) + 3 * len(weights.router) + tokens + 40
    largest_logit = (leaves["hidden"].detach() @ absolute_router_XH.T).max().item() if tokens else 0.0
    factor = chain * u * (1 + 2 * largest_logit)
    return BlockBounds(
        out=factor * out_TH.detach(),
        weights_TK=factor * decision.weights_TK.detach().abs(),
        gradients={name: factor * size for name, size in sizes.items()},
    )


def _absolute_logit_gradient(decision: reference.Route, gradient_TK: Tensor, spec: reference.RouterSpec) -> Tensor:
    """What rounding errors of the logits' gradient are relative to [T, X].

    With G the largest gradient of a token's weights and S the sum of its chosen scores, normalising gives the scores
    gradients up to 2 G / S, and the softmax (or the sigmoid) the logits up to twice that times the score.
    """
    chosen_TX = torch.zeros_like(decision.scores_TX).detach()
    real_TK = decision.choice_TK < spec.num_experts
    chosen_TX.scatter_add_(1, decision.choice_TK.clamp(max=chosen_TX.shape[1] - 1), real_TK.to(chosen_TX.dtype))
    scores_TX = decision.scores_TX.detach()
    total_T = (scores_TX * chosen_TX.clamp(max=1)).sum(-1, keepdim=True)
    per_score_T = gradient_TK.amax(-1, keepdim=True) * spec.routed_scaling_factor
    if spec.norm_topk_prob:
        per_score_T = 2 * per_score_T / total_T.masked_fill(total_T == 0, 1.0)
    return 2 * per_score_T * scores_TX
