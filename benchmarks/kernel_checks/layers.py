"""Whole steps of the four reference layers, recorded through the operators themselves: every launch, none forgotten.

Between Triton's launches torch runs operators of its own (a scan, copies); these are recorded too, by name.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from expert_layers.roofline import MODELS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

from hf_moe.kernels.layer_call import ExpertForm, ExpertWeights, LayerCall, LowRank, LowRankPair, flatten
from hf_moe.kernels.layer_op import AdapterWants, LayerOp, Wants
from hf_moe.kernels.triton.ops import triton_experts, triton_experts_lora

from .cases import FP8_BLOCK
from .launches import Call, recording

TOKENS, RANK = 8192, 16
DECODE_TOKENS = (1, 4, 16, 64)
FP8_MODELS = ("Qwen3-30B-A3B", "DeepSeek-V3")  # published in fp8
# torch's operators between our launches, and how many kernels each starts
KERNELS_OF_TORCH = {"cumsum": 2, "eq": 1, "_assert_async": 1, "clone": 1, "_to_copy": 1, "copy_": 1, "zero_": 1}
ALLOCATIONS = {"empty", "new_empty", "empty_like", "empty_strided"}


@dataclass(frozen=True)
class Layer:
    """A layer of the reference models under uniform routing, of `tokens` tokens; its weights in bfloat16 or fp8."""

    name: str
    hidden: int
    width: int
    experts: int
    slots: int
    tokens: int = TOKENS
    fp8: bool = False

    def tensor(self, *sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    def call(self, factors: LowRankPair | None = None) -> LayerCall:
        E, H, width = self.experts, self.hidden, self.width
        up, down = (2 * width, H), (H, width)
        if self.fp8:
            values = (self.tensor(E, *sizes, dtype=torch.float8_e4m3fn) for sizes in (up, down))
            grids = ([size // FP8_BLOCK for size in sizes] for sizes in (up, down))
            scales = (self.tensor(E, *grid, dtype=torch.float32) for grid in grids)
            experts = ExpertWeights(next(values), None, next(values), None, *scales)
        else:
            experts = ExpertWeights(self.tensor(E, *up), None, self.tensor(E, *down), None)
        index_TK = self.tensor(self.tokens, self.slots, dtype=torch.int64)
        weights_TK = self.tensor(self.tokens, self.slots, dtype=torch.float32)
        return LayerCall(self.tensor(self.tokens, H), index_TK, weights_TK, experts, E, ExpertForm("silu"), factors)

    def factors(self) -> LowRankPair:
        """As PEFT lays them out: the experts of the second factor are neighbours in memory."""
        E, H, width = self.experts, self.hidden, self.width

        def pair(inner: int, outer: int) -> LowRank:
            return LowRank(self.tensor(E, RANK, inner), self.tensor(outer, RANK, E).permute(2, 0, 1), 1.0)

        return LowRankPair(pair(H, 2 * width), pair(width, H))


@dataclass(frozen=True)
class TorchCall:
    """One operator of torch between the launches."""

    name: str
    launches: int
    nbytes: int


class _TorchCalls(TorchDispatchMode):
    """Adds what torch itself runs to the recorded calls.

    Raises:
        NotImplementedError: For an operator of which nothing says how many kernels it starts.
    """

    def __init__(self, calls: list):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        if name in KERNELS_OF_TORCH:
            tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
            nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.calls.append(TorchCall(name, KERNELS_OF_TORCH[name], nbytes))
        elif not (function.is_view or name in ALLOCATIONS):
            raise NotImplementedError(f"torch runs {name} in a layer: list its kernels in KERNELS_OF_TORCH.")
        return result


@dataclass(frozen=True)
class Mode:
    """What a step of a layer computes: its operator, and the gradients that are wanted, None for no backward pass."""

    name: str
    operator: Callable[[LayerCall], Tensor]
    tokens: int = TOKENS
    wants: Wants | AdapterWants | None = None


HIDDEN = {"hidden": True, "weights": True}
FROZEN = Wants(**HIDDEN, up_weight=False, up_bias=False, down_weight=False, down_bias=False)
MODES = (
    Mode("forward", triton_experts),
    Mode("frozen", triton_experts, wants=FROZEN),
    Mode("training", triton_experts, wants=FROZEN._replace(up_weight=True, down_weight=True)),
    Mode("LoRA", triton_experts_lora, wants=AdapterWants(*[True] * 6)),
    *(Mode(f"decode {tokens}", triton_experts, tokens) for tokens in DECODE_TOKENS),
)


def layers_and_modes(with_fp8: bool) -> Iterator[tuple[Layer, Mode]]:
    """Every layer in every mode; `with_fp8` also those that are published in fp8, which are not trained here."""
    yield from itertools.product((Layer(name, *shape) for name, shape in MODELS.items()), MODES)
    if with_fp8:
        stored = (Layer(f"{name} fp8", *MODELS[name], fp8=True) for name in FP8_MODELS)
        yield from itertools.product(stored, (mode for mode in MODES if mode.wants is None))


def step(layer: Layer, mode: Mode, target: GPUTarget, chip: str) -> list[Call | TorchCall]:
    """Every launch of one step of a layer on a chip, in order."""

    def run(op: LayerOp, call: LayerCall) -> Tensor:
        """Both passes as they run on a GPU: torch would only ask for the shapes of tensors without storage."""
        out_TH, *kept = op._run_forward(*flatten(call), mode.wants is not None)
        if mode.wants is not None:
            op._run_backward(torch.empty_like(out_TH), *kept, *flatten(call), list(mode.wants))
        return out_TH

    call = layer.call(layer.factors() if isinstance(mode.wants, AdapterWants) else None)
    with mock.patch.object(LayerOp, "__call__", run), recording(target, chip) as (calls, _), _TorchCalls(calls):
        mode.operator(call)
    return calls
