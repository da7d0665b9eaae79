"""The closed form of an expert's activation, found by trying it: kernels fuse the forms that they know.

Transformers lets every class bring its own `_apply_gate`. Names and attributes do not tell what it computes, so it is
called on a few numbers, its parameters are read off the answers, and the form counts as known only if it then predicts
all other answers too. What is not known runs as the module's own Python code.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# float32 activations (Beam) leave errors of this size in float64 probes
_TOLERANCE = 1e-6
_FAR = 1e4  # beyond every limit in use (7 to 10 in transformers 5.23)
_GRID = (-30.0, -9.0, -7.0, -6.5, -3.0, -1.0, -0.3, 0.0, 0.2, 1.0, 2.5, 6.5, 7.0, 9.0, 12.5, 30.0, 300.0)


@dataclass(frozen=True)
class ExpertActivation:
    """`(clamp(up, -limit, limit) + offset) * f(min(gate, limit))`, or `f(pre)` for experts without a gate.

    Attributes:
        activation: f: "silu" (x * sigmoid(alpha * x)), "gelu", "gelu_tanh", "relu" or "relu2" (relu squared).
        alpha: Slope of the sigmoid in "silu" (gpt-oss: 1.702).
        limit: Bound of gate and up (gpt-oss: 7), infinity for none.
        offset: Added to up (gpt-oss: 1).
    """

    activation: str
    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.limit != math.inf:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + self.offset) * self.function(gate)

    def function(self, x: Tensor) -> Tensor:
        """f, of any shape and floating dtype."""
        match self.activation:
            case "silu":
                return F.silu(x) if self.alpha == 1 else x * torch.sigmoid(self.alpha * x)
            case "gelu":
                return F.gelu(x)
            case "gelu_tanh":
                return F.gelu(x, approximate="tanh")
            case "relu":
                return F.relu(x)
            case "relu2":
                return F.relu(x).square()
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}.")


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def find_activation(experts: Any) -> ExpertActivation | None:
    """The closed form of what `experts`, a module of transformers' contract, do between their products, or None.

    The module's own code runs a few times on a few hundred float64 numbers on the CPU.
    """
    # the modes of torch.export, fake tensors and default devices belong to a thread: in a new one numbers are numbers
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_find_activation, experts).result()


@torch.no_grad()
def _find_activation(experts: Any) -> ExpertActivation | None:
    activation = getattr(experts, "act_fn", None)  # an `_apply_gate` of the class's own may do without
    if isinstance(activation, nn.Module) and next(activation.parameters(), None) is not None:
        return None  # training may change it
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        if not experts.has_gate:
            return _find_ungated(experts)
        return _find_gated(experts)


def _find_ungated(experts: Any) -> ExpertActivation | None:
    x = torch.tensor(_GRID, dtype=torch.float64)
    actual = _tried(experts.act_fn, x, x.shape)
    if actual is None:
        return None
    for found in _functions(_sigmoid_slope(actual[_GRID.index(1.0)].item())):
        if _agree(actual, found.function(x)):
            return found
    return None


def _find_gated(experts: Any) -> ExpertActivation | None:
    interleaved = not experts.is_concatenated

    def probe(gate: Tensor, up: Tensor) -> Tensor | None:
        pre = torch.stack((gate, up), -1).flatten(-2) if interleaved else torch.cat((gate, up), -1)
        return _tried(experts._apply_gate, pre, gate.shape)

    # gate = 1 everywhere: act = (clamp(up) + offset) * f(1), read at up = 0, 1 and far outside
    at_one = probe(torch.ones(3, dtype=torch.float64), torch.tensor([0.0, 1.0, _FAR], dtype=torch.float64))
    if at_one is None:
        return None
    zero, one, far = at_one.tolist()
    if one == zero:
        return None
    offset, reach = zero / (one - zero), (far - zero) / (one - zero)
    limit = math.inf if abs(reach - _FAR) < 1e-3 * _FAR else _rounded(reach)
    grid = torch.tensor(_GRID, dtype=torch.float64)
    gates, ups = (side.flatten() for side in torch.meshgrid(grid, grid, indexing="ij"))
    actual = probe(gates, ups)
    if actual is None:
        return None
    for found in _functions(_sigmoid_slope(one - zero), limit, _rounded(offset)):
        if _agree(actual, found(gates, ups)):
            return found
    return None


def _tried(function: Any, x: Tensor, shape: torch.Size) -> Tensor | None:
    """`function(x)`; None if it cannot take float64 numbers on the CPU, or returns another shape."""
    try:
        out = function(x)
    except (RuntimeError, NotImplementedError):  # what torch raises for a dtype or device that a kernel lacks
        return None
    return out.double() if out.shape == shape else None


def _sigmoid_slope(f_of_one: float) -> float:
    """alpha of silu from f(1) = sigmoid(alpha); any number where f is not silu, which the comparison then finds."""
    return _rounded(math.log(f_of_one / (1 - f_of_one))) if 0 < f_of_one < 1 else 1.0


def _functions(alpha: float, limit: float = math.inf, offset: float = 0.0) -> list[ExpertActivation]:
    return [ExpertActivation(name, alpha if name == "silu" else 1.0, limit, offset) for name in ACTIVATIONS]


def _rounded(number: float) -> float:
    """Configs hold such parameters with a few digits; a float32 activation returns them with rounding errors."""
    return round(number, 5)


def _agree(actual: Tensor, predicted: Tensor) -> bool:
    return torch.allclose(actual, predicted, rtol=_TOLERANCE, atol=_TOLERANCE)
