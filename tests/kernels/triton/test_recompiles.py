"""No kernel is compiled again, or loaded, for another length of a batch or for other tensors of the same sizes.

What Triton compiles a launch as is recorded instead of run, by its own rules for a GPU, from tensors of the CPU: their
addresses tell alignment, those of the meta device do not.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks.kernel_checks.launches import Launch, entry_kernels, specialize
from hf_moe.kernels.triton import hybrid, routing, tiles
from hf_moe.kernels.triton.decode import launch_decode
from hf_moe.kernels.triton.ops import triton_experts, triton_experts_lora
from hf_moe.kernels.triton.tiles import Tile
from kernel_cases import FORMS, Layer, low_rank_of

H100 = GPUTarget("cuda", 90, 32)
E, K, HIDDEN, WIDTH, RANK = 5, 3, 32, 16, 8
SIZES = {"up_a": (RANK, HIDDEN), "up_b": (2 * WIDTH, RANK), "down_a": (RANK, WIDTH), "down_b": (HIDDEN, RANK)}


@functools.cache
def compilable(function: InterpretedFunction) -> JITFunction:
    return JITFunction(function.fn, **function.kwargs)


@pytest.fixture
def launches(monkeypatch, interpreter) -> list[Launch]:
    """Launches so far; nothing runs, so that results are whatever was in memory."""
    recorded = []

    def run(self, *args, grid, warmup, **kwargs):
        recorded.append(specialize(compilable(self), H100, grid, args, kwargs))

    def product(rows_NA, weight, order, transposed):
        return rows_NA.new_empty(rows_NA.shape[0], weight.shape[2 if transposed else 1])

    def outer_product(out_NB, in_NA, order, transposed):
        left, right = (in_NA, out_NB) if transposed else (out_NB, in_NA)
        return left.new_empty(E, left.shape[1], right.shape[1])

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(hybrid, "_product", product)
    monkeypatch.setattr(hybrid, "_outer_product", outer_product)
    monkeypatch.setattr(routing, "_require_ids", lambda *arguments: None)
    return recorded


def new(*shape: int, dtype: torch.dtype = torch.bfloat16, offset: int = 0) -> Tensor:
    """A tensor that starts `offset` values behind what the allocator gives."""
    memory = torch.randint(E, (offset + torch.Size(shape).numel(),)).to(dtype)
    return memory[offset:].view(shape)


def layer(tokens: int, elsewhere: bool = False) -> Layer:
    """A layer with biases. Elsewhere: rows at another address of an allocator that gives multiples of 512 bytes, as
    CUDA's does, ids and routing weights at any, such as part of a longer batch's.
    """
    hidden = new(tokens, HIDDEN, offset=256 * elsewhere)
    index = new(tokens, K, dtype=torch.int64, offset=elsewhere)
    weights = new(tokens, K, dtype=torch.float32, offset=elsewhere)
    up, down = new(E, HIDDEN, 2 * WIDTH), new(E, WIDTH, HIDDEN)
    return Layer(hidden, index, weights, up, new(E, 2 * WIDTH), down, new(E, HIDDEN), FORMS["gpt_oss"])


def train(op: Callable, case: Layer, adapted: bool = False) -> None:
    if not adapted:
        op(case.differentiable().call()).backward(torch.ones_like(case.hidden))
        return
    factors = {name: new(E, *shape).requires_grad_() for name, shape in SIZES.items()}
    case = replace(case, hidden=case.hidden.requires_grad_(), weights=case.weights.requires_grad_())
    op(case.call(low_rank_of(factors, (2.0, 2.0)))).backward(torch.ones_like(case.hidden))


CALLS = {
    "decode": lambda case: launch_decode(case.call()),
    "inference": lambda case: triton_experts(case.call()),
    "training": lambda case: train(triton_experts, case),
    "adapters": lambda case: train(triton_experts_lora, case, adapted=True),
    "hybrid": lambda case: train(hybrid.triton_hybrid_experts, case),
}
LENGTHS = {name: [*range(2, 22), *range(4096, 4116)] for name in CALLS} | {"decode": range(1, 41)}


def variants(launches: list[Launch], name: str, case: Layer) -> set[Launch]:
    """What one call launches, as Triton would compile it."""
    launches.clear()
    CALLS[name](case)
    return set(launches)


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("name", CALLS)
def test_every_length_launches_the_same_compiled_kernels(name, rows, launches, monkeypatch):
    monkeypatch.setattr(tiles, "INTERPRETED", Tile(rows, 16, 16, num_warps=4, num_stages=1))
    first, *others = LENGTHS[name]
    wanted = variants(launches, name, layer(first))
    assert wanted
    for tokens in others:
        new_ones = variants(launches, name, layer(tokens)) - wanted
        assert not new_ones, f"{tokens} tokens compile {new_ones} besides {wanted}"


@pytest.mark.parametrize("name", CALLS)
def test_a_second_call_of_the_same_sizes_loads_nothing(name, launches):
    """So a CUDA graph may be captured after one warm call, whatever the tensors."""
    wanted = variants(launches, name, layer(40))
    assert variants(launches, name, layer(40, elsewhere=True)) <= wanted


def test_every_kernel_is_among_them(launches):
    reached = {(launch.module, launch.kernel) for name in CALLS for launch in variants(launches, name, layer(40))}
    assert not entry_kernels() - reached, "add a call to CALLS that launches them"
