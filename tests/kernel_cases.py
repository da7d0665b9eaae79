"""One layer of experts for the tests of kernels: every layout and activation, plain torch, and float32 bounds.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, H hidden, I expert width, P pre-activation
width (2I gated, I ungated).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_moe.kernels.layer_call import ExpertForm, ExpertWeights, LayerCall, LowRank, LowRankPair
from numerics import ROUTINGS, assert_as_good_as, assert_within

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TENSORS = ("hidden", "weights", "up_weight", "up_bias", "down_weight", "down_bias")


# every activation, layout and bias, pairwise
FORMS = {
    "silu": ExpertForm("silu"),
    "gpt_oss": ExpertForm("silu", 1.702, 0.9, 1.0, transposed=True, interleaved=True),
    "gelu_transposed": ExpertForm("gelu", transposed=True),
    "gelu_tanh_interleaved": ExpertForm("gelu_tanh", interleaved=True),
    "relu_limit": ExpertForm("relu", limit=0.7, interleaved=True),
    "relu2_ungated": ExpertForm("relu2", gated=False),
    "silu_ungated_transposed": ExpertForm("silu", gated=False, transposed=True),
    "gelu_ungated": ExpertForm("gelu", gated=False),
}
BIASED = ("gpt_oss", "gelu_transposed", "relu2_ungated", "silu_ungated_transposed")


@dataclass(frozen=True)
class Layer:
    """A layer and its input: weights in the layout that `form` names."""

    hidden: Tensor
    index: Tensor
    weights: Tensor
    up_weight: Tensor
    up_bias: Tensor | None
    down_weight: Tensor
    down_bias: Tensor | None
    form: ExpertForm

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Layer":
        cast = {name: value.to(device, dtype) for name, value in self.tensors().items()}
        return replace(self, **cast, index=self.index.to(device))

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in TENSORS if getattr(self, name) is not None}

    def differentiable(self) -> "Layer":
        return replace(self, **{name: value.detach().requires_grad_() for name, value in self.tensors().items()})

    @property
    def num_experts(self) -> int:
        return self.up_weight.shape[0]

    def call(self, low_rank: LowRankPair | None = None) -> LayerCall:
        """The layer as fused operators take it, sentinels allowed."""
        experts = ExpertWeights(self.up_weight, self.up_bias, self.down_weight, self.down_bias)
        num_ids = self.num_experts + 1
        return LayerCall(self.hidden, self.index, self.weights, experts, num_ids, self.form, low_rank)


def low_rank_of(factors: Mapping[str, Tensor | None], scales: tuple[float, float]) -> LowRankPair:
    """The adapters of factors by name (up_a, up_b, down_a, down_b); those of a projection may be missing."""
    pairs = [(factors.get(f"{name}_a"), factors.get(f"{name}_b")) for name in ("up", "down")]
    return LowRankPair(
        *(None if pair == (None, None) else LowRank(*pair, scale) for pair, scale in zip(pairs, scales, strict=True))
    )


def layer(routing: str = "balanced", form: str = "silu", bias: bool | None = None) -> Layer:
    """The layer of a named routing (tests/numerics.py) with the weights as the named form lays them out.

    Values are exact in bfloat16 and float16.
    """
    case, spec = ROUTINGS[routing](), FORMS[form]
    up, down = case.gate_up, case.down
    if not spec.gated:
        up = up[:, : up.shape[1] // 2]
    up, down = (weight.transpose(1, 2).contiguous() if spec.transposed else weight for weight in (up, down))
    generator = torch.Generator().manual_seed(1)

    def random_bias(width: int) -> Tensor | None:
        if not (form in BIASED if bias is None else bias):
            return None
        return torch.randn(len(up), width, generator=generator).bfloat16().float()

    inner = 1 if spec.transposed else 2
    up_bias, down_bias = random_bias(up.shape[3 - inner]), random_bias(case.hidden.shape[1])
    return Layer(case.hidden, case.index, case.weights, up, up_bias, down, down_bias, spec)


def activate(pre_NP: Tensor, form: ExpertForm, absolute: bool = False) -> Tensor:
    function = _absolute_activation if absolute else _activation
    if not form.gated:
        return function(pre_NP, form)
    if form.interleaved:
        gate_NI, up_NI = pre_NP[:, ::2], pre_NP[:, 1::2]
    else:
        gate_NI, up_NI = pre_NP.chunk(2, dim=1)
    if not absolute:  # an absolute value that a clamp cuts off would no longer bound
        gate_NI, up_NI = gate_NI.clamp(max=form.limit), up_NI.clamp(-form.limit, form.limit)
    return (up_NI + form.offset) * function(gate_NI, form)


def _activation(x: Tensor, form: ExpertForm) -> Tensor:
    match form.activation:
        case "silu":
            return x * torch.sigmoid(form.alpha * x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "relu":
            return F.relu(x)
        case _:
            return F.relu(x).square()


def _absolute_activation(x: Tensor, form: ExpertForm) -> Tensor:
    """Not below any activation, nor its slope below theirs, at a non-negative x."""
    return x.square() if form.activation == "relu2" else 1.13 * x


def plain_pre(layer: Layer, expert: int, rows_NH: Tensor) -> Tensor:
    weight = layer.up_weight[expert]
    pre_NP = rows_NH @ (weight if layer.form.transposed else weight.T)
    return pre_NP if layer.up_bias is None else pre_NP + layer.up_bias[expert]


def plain_down(layer: Layer, expert: int, act_NI: Tensor) -> Tensor:
    weight = layer.down_weight[expert]
    y_NH = act_NI @ (weight if layer.form.transposed else weight.T)
    return y_NH if layer.down_bias is None else y_NH + layer.down_bias[expert]


def plain_layer(layer: Layer, absolute: bool = False) -> Tensor:
    """Plain torch in the layer's dtype, one expert after the other; differentiable."""
    out_TH = torch.zeros_like(layer.hidden)
    for expert in range(layer.num_experts):
        token_N, slot_N = torch.where(layer.index == expert)
        act_NI = activate(plain_pre(layer, expert, layer.hidden[token_N]), layer.form, absolute)
        out_NH = plain_down(layer, expert, act_NI) * layer.weights[token_N, slot_N, None]
        out_TH = out_TH.index_add(0, token_N, out_NH.to(out_TH.dtype))
    return out_TH


def absolute_layer(layer: Layer) -> Layer:
    """Every value made positive, in float64: what rounding errors are relative to."""
    absolute = {name: value.detach().double().abs() for name, value in layer.tensors().items()}
    form = layer.form._replace(offset=abs(layer.form.offset))
    return replace(layer, **absolute, form=form).differentiable()


def rounding(layer: Layer) -> float:
    """Relative float32 error of the layer's results and gradients, to their absolute sizes.

    The longest chain of additions, and once more the pre-activation's error through an activation's curvature.
    """
    (tokens, hidden_size), slots = layer.hidden.shape, layer.index.shape[1]
    width = layer.down_weight.shape[1 if layer.form.transposed else 2]
    largest = 0.0
    for expert in range(layer.num_experts):
        pre = plain_pre(absolute_layer(layer), expert, layer.hidden.double().abs().nan_to_num(0.0))
        largest = max(largest, pre.max().item() if tokens else 0.0)
    chain = 2 * hidden_size + 2 * width + tokens * slots + 40
    return chain * torch.finfo(torch.float32).eps / 2 * (1 + 2 * max(layer.form.alpha, 1.0) * largest)


def assert_right(
    actual: Tensor, baseline: Tensor, exact: Tensor, size: Tensor, factor: float, what: str = "result"
) -> None:
    """numerics.py's rule for the dtype: 16 bits at most twice as far as `baseline`, float32 within `factor * size`."""
    if actual.dtype == torch.float32:
        bound = factor * size.nan_to_num(0.0) + torch.finfo(torch.float32).smallest_normal
        assert_within(actual, exact, bound, what)
    else:
        assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
        assert_as_good_as(actual, baseline, exact)


def amid_nan(tensor: Tensor) -> Tensor:
    """The same values with NaN before and after every row."""
    padded = tensor.new_full([size + 6 for size in tensor.shape], float("nan"))
    inner = padded[tuple(slice(3, -3) for _ in tensor.shape)]
    return inner.copy_(tensor)


def layer_results(layer: Layer, cotangent_TH: Tensor) -> dict[str, Tensor]:
    """Output and gradients of every tensor, by plain torch in the layer's dtype."""
    leaves = layer.differentiable()
    return _with_gradients(plain_layer(leaves), leaves, cotangent_TH)


def layer_sizes(layer: Layer, cotangent_TH: Tensor) -> dict[str, Tensor]:
    """Sizes that float32 rounding errors of `layer_results` are relative to."""
    leaves = absolute_layer(layer)
    return _with_gradients(plain_layer(leaves, absolute=True), leaves, cotangent_TH.double().abs())


def _with_gradients(out_TH: Tensor, leaves: Layer, cotangent_TH: Tensor) -> dict[str, Tensor]:
    tensors = leaves.tensors()
    gradients = torch.autograd.grad(out_TH, list(tensors.values()), cotangent_TH.to(out_TH.dtype))
    return {"out": out_TH.detach(), **dict(zip(tensors, gradients, strict=True))}
