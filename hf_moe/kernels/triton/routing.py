"""Sort routed rows by expert and list the row tiles of every expert, on the device; the CPU waits for nothing.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, S ids (E, or E + 1 with the sentinel) and
one bucket for ids out of range, B blocks of slots, M row tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# the places compare every pair of slots of a program: 128 spill on gfx942
SLOTS_PER_PROGRAM = 64
# a warp of gfx942 has 64 lanes, and a histogram has at least one bin a lane
FEWEST_BINS = 64
TILES_PER_STEP = 64


class RowOrder(NamedTuple):
    """Routed rows sorted by expert, ties by slot; sentinel slots come last.

    order_N: int32; row r is slot `order_N[r]` = t*K + k.
    expert_end_E: int32; the rows of expert e are [expert_end_E[e - 1], expert_end_E[e]).
    """

    order_N: Tensor
    expert_end_E: Tensor


class TileMap(NamedTuple):
    """Row tiles, each of one expert, expert after expert.

    expert_M: int32; the tile's expert, or -1.
    row_M: int32; the tile's first row. With expert -1 the tile holds rows that no expert computes (past the last
        expert's end; their result is zero), or nothing when it is -1 as well.
    """

    expert_M: Tensor
    row_M: Tensor


def require_gpu(tensor: Tensor) -> None:
    """Raise RuntimeError for a CPU tensor unless Triton interprets its kernels."""
    if tensor.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise RuntimeError(
            "Triton kernels need tensors on a GPU, got device cpu. Use the CPU kernels (hf_moe.kernels.cpu), or set "
            "TRITON_INTERPRET=1 before triton is imported to interpret the kernels slowly for tests."
        )


@triton.jit
def _load_bucket(index_N, slots, num_rows, num_ids, PADDING: tl.constexpr):
    """The ids of `slots`; `num_ids` for an id out of range, PADDING for a slot past the last."""
    ids = tl.load(index_N + slots, mask=slots < num_rows, other=0)
    bucket = tl.where((ids >= 0) & (ids < num_ids), ids, num_ids).to(tl.int32)
    return tl.where(slots < num_rows, bucket, PADDING)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def count_kernel(index_N, count_SB, num_rows, num_blocks, num_ids, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Slots of every id in one block of slots. Grid (B,)."""
    block = tl.program_id(0)
    bucket = _load_bucket(index_N, block * BLOCK + tl.arange(0, BLOCK), num_rows, num_ids, BINS - 1)
    bins = tl.arange(0, BINS)
    counts = tl.histogram(bucket, BINS)
    tl.store(count_SB + bins.to(tl.int64) * num_blocks + block, counts, mask=bins <= num_ids)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def place_kernel(
    index_N, end_SB, order_N, expert_end_E, num_rows, num_blocks, num_ids, num_experts,
    BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write every slot to its sorted place: the end of its id's run in this block, less the equal ids from it on."""
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    slots = block * BLOCK + lanes
    bucket = _load_bucket(index_N, slots, num_rows, num_ids, BINS - 1)
    same = (bucket[:, None] == bucket[None, :]) & (lanes[None, :] >= lanes[:, None])
    from_here = tl.sum(same.to(tl.int32), axis=1)
    end = tl.load(end_SB + bucket.to(tl.int64) * num_blocks + block, mask=slots < num_rows, other=0)
    tl.store(order_N + (end - from_here), slots, mask=slots < num_rows)
    if block == 0:
        experts = tl.arange(0, BINS)
        last = end_SB + experts.to(tl.int64) * num_blocks + num_blocks - 1
        expert_end = tl.load(last, mask=experts < num_experts, other=0)
        tl.store(expert_end_E + experts, expert_end, mask=experts < num_experts)


def sort_rows(index_TK: Tensor, num_experts: int, num_ids: int) -> RowOrder:
    """Sort the slots of `index_TK` (int32 or int64) by expert with a stable counting sort; nothing syncs on a GPU.

    Raises:
        ValueError: If `num_ids` is neither `num_experts` nor `num_experts + 1`.
        IndexError: Under the interpreter, if an id is not in [0, num_ids). On a GPU the same is an asynchronous
            device assertion.
    """
    if num_ids not in (num_experts, num_experts + 1):
        raise ValueError(
            f"num_ids must be {num_experts} (the experts) or {num_experts + 1} (with the sentinel), got {num_ids}."
        )
    require_gpu(index_TK)
    index_N = index_TK.reshape(-1)
    order_N = torch.empty(index_N.numel(), dtype=torch.int32, device=index_N.device)
    if not index_N.numel():
        return RowOrder(order_N, torch.zeros(num_experts, dtype=torch.int32, device=index_N.device))
    num_blocks = triton.cdiv(index_N.numel(), SLOTS_PER_PROGRAM)
    bins = max(FEWEST_BINS, triton.next_power_of_2(num_ids + 2))
    count_SB = torch.empty(num_ids + 1, num_blocks, dtype=torch.int32, device=index_N.device)
    expert_end_E = torch.empty(num_experts, dtype=torch.int32, device=index_N.device)
    sizes = (index_N.numel(), num_blocks, num_ids)
    count_kernel[(num_blocks,)](index_N, count_SB, *sizes, BINS=bins, BLOCK=SLOTS_PER_PROGRAM)
    end_SB = count_SB.view(-1).cumsum(0, dtype=torch.int32).view_as(count_SB)
    _require_ids(index_N, num_ids, end_SB[num_ids - 1, -1] == index_N.numel())
    place_kernel[(num_blocks,)](
        index_N, end_SB, order_N, expert_end_E, *sizes, num_experts, BINS=bins, BLOCK=SLOTS_PER_PROGRAM
    )
    return RowOrder(order_N, expert_end_E)


def _require_ids(index_N: Tensor, num_ids: int, all_in_range: Tensor) -> None:
    rule = f"expert ids must be in [0, {num_ids})"
    if index_N.device.type != "cpu":
        torch._assert_async(all_in_range, rule)  # reading the flag here would wait for the GPU
    elif not all_in_range:
        wrong = index_N[(index_N < 0) | (index_N >= num_ids)][0].item()
        raise IndexError(f"{rule}, got {wrong}. The router's ids must match the number of expert weights.")


@triton.jit(do_not_specialize=["num_rows"])
def ids_in_range_kernel(index_N, all_in_range, num_rows, num_ids, BLOCK: tl.constexpr):
    """Store 1 if every id is in [0, num_ids), for few rows, else 0. Grid (1,)."""
    slots = tl.arange(0, BLOCK)
    ids = tl.load(index_N + slots, mask=slots < num_rows, other=0)
    wrong = tl.sum(((ids < 0) | (ids >= num_ids)).to(tl.int32), axis=0)
    tl.store(all_in_range, (wrong == 0).to(tl.int32))


def require_ids(index_TK: Tensor, num_ids: int) -> None:
    """Check the ids of few rows, which need no sort; errors as in `sort_rows`."""
    require_gpu(index_TK)
    index_N = index_TK.reshape(-1)
    if index_N.numel():
        all_in_range = torch.empty((), dtype=torch.int32, device=index_N.device)
        block = triton.next_power_of_2(index_N.numel())
        ids_in_range_kernel[(1,)](index_N, all_in_range, index_N.numel(), num_ids, BLOCK=block)
        _require_ids(index_N, num_ids, all_in_range)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def tile_map_kernel(
    expert_end_E, expert_M, row_M, num_rows, num_experts, num_tiles,
    BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """List one expert's tiles; the last program lists the rows of no expert and the unused tiles. Grid (E + 1,)."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    earlier = experts < expert
    ends = tl.load(expert_end_E + experts, mask=earlier, other=0)
    starts = tl.load(expert_end_E + experts - 1, mask=earlier & (experts > 0), other=0)
    first_tile = tl.sum((ends - starts + BLOCK_M - 1) // BLOCK_M, axis=0)
    first_row = tl.max(ends, axis=0)
    if expert < num_experts:
        end_row = tl.load(expert_end_E + expert)
        end_tile = first_tile + (end_row - first_row + BLOCK_M - 1) // BLOCK_M
        label = expert
    else:
        end_row = num_rows
        end_tile = num_tiles
        label = -1
    for tile in range(first_tile, end_tile, STEP):
        tiles = tile + tl.arange(0, STEP)
        rows = first_row + (tiles - first_tile) * BLOCK_M
        tl.store(expert_M + tiles, tl.zeros_like(tiles) + label, mask=tiles < end_tile)
        tl.store(row_M + tiles, tl.where(rows < end_row, rows, -1), mask=tiles < end_tile)


def tile_map(expert_end_E: Tensor, num_rows: int, block_m: int) -> TileMap:
    """Cut the rows of every expert into tiles of `block_m` rows. The number of tiles depends on sizes alone."""
    require_gpu(expert_end_E)
    num_experts = expert_end_E.numel()
    num_tiles = triton.cdiv(num_rows, block_m) + min(num_experts + 1, num_rows)
    expert_M, row_M = torch.empty(2, num_tiles, dtype=torch.int32, device=expert_end_E.device).unbind()
    if num_tiles:
        tile_map_kernel[(num_experts + 1,)](
            expert_end_E, expert_M, row_M, num_rows, num_experts, num_tiles,
            BLOCK_M=block_m, EXPERTS=triton.next_power_of_2(num_experts), STEP=TILES_PER_STEP,
        )  # fmt: skip
    return TileMap(expert_M, row_M)
