"""Sort routed rows by expert and list the row tiles of every expert, on the device; the CPU waits for nothing.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, S ids (E, or E + 1 with the sentinel) and
one bucket for ids out of range, B blocks of slots, M row tiles of one height, X entries of all their maps.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import TILE_HEIGHTS

# the places compare every pair of slots of a program: 128 spill on gfx942
SLOTS_PER_PROGRAM = 64
# a warp of gfx942 has 64 lanes, and a histogram has at least one bin a lane
FEWEST_BINS = 64
TILES_PER_STEP = 64
# Triton compiles a kernel again for a pointer that is not a multiple of 16 bytes.
ALIGNED = 4


class TileMap(NamedTuple):
    """Row tiles, each of one expert, expert after expert.

    expert_M: int32; the tile's expert, or -1.
    row_M: int32; the tile's first row. With expert -1 the tile holds rows that no expert computes (past the last
        expert's end; their result is zero), or nothing when it is -1 as well.
    """

    expert_M: Tensor
    row_M: Tensor


class RowOrder(NamedTuple):
    """Routed rows sorted by expert, ties by slot; sentinel slots come last.

    order_N: int32; row r is slot `order_N[r]` = t*K + k.
    expert_end_E: int32; the rows of expert e are [expert_end_E[e - 1], expert_end_E[e]).
    tile_maps_X: int32; a TileMap of every height, see `tiles`.
    """

    order_N: Tensor
    expert_end_E: Tensor
    tile_maps_X: Tensor

    def tiles(self, block_m: int) -> TileMap:
        """Row tiles of one height, views.

        Raises:
            ValueError: If `block_m` is not one of TILE_HEIGHTS.
        """
        if block_m not in TILE_HEIGHTS:
            raise ValueError(f"row tiles are {TILE_HEIGHTS} rows high, got {block_m}: choose one of these.")
        num_rows = self.order_N.numel()
        for height, first, pitch, num_tiles in _places_of_maps(num_rows, self.expert_end_E.numel()):
            if height == block_m:
                maps = self.tile_maps_X
                return TileMap(maps[first : first + num_tiles], maps[first + pitch : first + pitch + num_tiles])
        raise AssertionError("every height has a map")

    def arguments(self, block_m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What kernels over tiles of this height take: order, ends of experts, expert and first row of tiles."""
        return self.order_N, self.expert_end_E, *self.tiles(block_m)


def _places_of_maps(num_rows: int, num_experts: int) -> Iterator[tuple[int, int, int, int]]:
    """(height, place of its experts, from there to its rows, number of tiles): of sizes alone, also symbolic ones."""
    first, spare = 0, torch.sym_min(num_experts + 1, num_rows)
    for height in TILE_HEIGHTS:
        num_tiles = triton.cdiv(num_rows, height) + spare
        pitch = triton.cdiv(num_tiles, ALIGNED) * ALIGNED
        yield height, first, pitch, num_tiles
        first += 2 * pitch


def size_of_maps(num_rows: int, num_experts: int) -> int:
    """Entries of the tile maps of all heights."""
    _, first, pitch, _ = list(_places_of_maps(num_rows, num_experts))[-1]
    return first + 2 * pitch


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


@triton.jit(do_not_specialize=["num_rows", "num_blocks"], do_not_specialize_on_alignment=["index_N"])
def count_kernel(index_N, count_SB, num_rows, num_blocks, num_ids, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Slots of every id in one block of slots. Grid (B,)."""
    block = tl.program_id(0)
    bucket = _load_bucket(index_N, block * BLOCK + tl.arange(0, BLOCK), num_rows, num_ids, BINS - 1)
    bins = tl.arange(0, BINS)
    counts = tl.histogram(bucket, BINS)
    tl.store(count_SB + bins.to(tl.int64) * num_blocks + block, counts, mask=bins <= num_ids)


# num_ids: Triton makes a 1 a constant, which has no `.to`
@triton.jit(do_not_specialize=["num_rows", "num_blocks", "num_ids"], do_not_specialize_on_alignment=["index_N"])
def place_kernel(
    index_N, end_SB, order_N, expert_end_E, all_in_range, num_rows, num_blocks, num_ids, num_experts,
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
        num_in_range = tl.load(end_SB + num_ids.to(tl.int64) * num_blocks - 1)
        tl.store(all_in_range, (num_in_range == num_rows).to(tl.int32))


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
    index_N = index_TK.reshape(-1).contiguous()  # [T, 1] cut out of more columns is flattened to a strided view
    order_N = torch.empty(index_N.numel(), dtype=torch.int32, device=index_N.device)
    if not index_N.numel():
        return rows_in_order(order_N, torch.zeros(num_experts, dtype=torch.int32, device=index_N.device))
    num_blocks = triton.cdiv(index_N.numel(), SLOTS_PER_PROGRAM)
    bins = max(FEWEST_BINS, triton.next_power_of_2(num_ids + 2))
    count_SB = torch.empty(num_ids + 1, num_blocks, dtype=torch.int32, device=index_N.device)
    expert_end_E = torch.empty(num_experts, dtype=torch.int32, device=index_N.device)
    all_in_range = torch.empty((), dtype=torch.int32, device=index_N.device)
    sizes = (index_N.numel(), num_blocks, num_ids)
    count_kernel[(num_blocks,)](index_N, count_SB, *sizes, BINS=bins, BLOCK=SLOTS_PER_PROGRAM)
    end_SB = count_SB.view(-1).cumsum(0, dtype=torch.int32).view_as(count_SB)
    place_kernel[(num_blocks,)](
        index_N, end_SB, order_N, expert_end_E, all_in_range, *sizes, num_experts, BINS=bins, BLOCK=SLOTS_PER_PROGRAM
    )
    _require_ids(index_N, num_ids, all_in_range)
    return rows_in_order(order_N, expert_end_E)


def _require_ids(index_N: Tensor, num_ids: int, all_in_range: Tensor) -> None:
    rule = f"expert ids must be in [0, {num_ids})"
    if index_N.device.type != "cpu":
        torch._assert_async(all_in_range, rule)  # reading the flag here would wait for the GPU
    elif not all_in_range:
        wrong = index_N[(index_N < 0) | (index_N >= num_ids)][0].item()
        raise IndexError(f"{rule}, got {wrong}. The router's ids must match the number of expert weights.")


@triton.jit
def list_tiles(
    map_at, expert, ends, starts, first_row, end_row, num_tiles, is_expert,
    BLOCK_M: tl.constexpr, ALIGN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """List one expert's tiles of one height, or those of no expert and the unused ones; where the next map begins."""
    pitch = (num_tiles + ALIGN - 1) // ALIGN * ALIGN
    first_tile = tl.sum((ends - starts + BLOCK_M - 1) // BLOCK_M, axis=0)
    end_tile = first_tile + (end_row - first_row + BLOCK_M - 1) // BLOCK_M
    end_tile = tl.where(is_expert, end_tile, pitch)
    label = tl.where(is_expert, expert, -1)
    for tile in range(first_tile, end_tile, STEP):
        tiles = tile + tl.arange(0, STEP)
        rows = first_row + (tiles - first_tile) * BLOCK_M
        tl.store(map_at + tiles, tl.zeros_like(tiles) + label, mask=tiles < end_tile)
        tl.store(map_at + pitch + tiles, tl.where(rows < end_row, rows, -1), mask=tiles < end_tile)
    return map_at + 2 * pitch


@triton.jit(do_not_specialize=["num_rows", "num_spare"])
def tile_maps_kernel(
    expert_end_E, tile_maps_X, num_rows, num_experts, num_spare,
    SHORTEST: tl.constexpr, NUM_HEIGHTS: tl.constexpr, ALIGN: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """List one expert's tiles of every height; the last program, those of no expert and unused ones. Grid (E + 1,)."""
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    earlier = experts < expert
    ends = tl.load(expert_end_E + experts, mask=earlier, other=0)
    starts = tl.load(expert_end_E + experts - 1, mask=earlier & (experts > 0), other=0)
    first_row = tl.max(ends, axis=0)
    is_expert = expert < num_experts
    end_row = tl.load(expert_end_E + expert, mask=is_expert, other=0)
    end_row = tl.where(is_expert, end_row, num_rows)
    map_at = tile_maps_X
    for height in tl.static_range(NUM_HEIGHTS):
        num_tiles = tl.cdiv(num_rows, SHORTEST * 2**height) + num_spare
        map_at = list_tiles(
            map_at, expert, ends, starts, first_row, end_row, num_tiles, is_expert, SHORTEST * 2**height, ALIGN, STEP
        )  # fmt: skip


def rows_in_order(order_N: Tensor, expert_end_E: Tensor) -> RowOrder:
    """Cut the rows of every expert into tiles of every height, in one launch."""
    require_gpu(expert_end_E)
    num_rows, num_experts = order_N.numel(), expert_end_E.numel()
    tile_maps_X = torch.empty(size_of_maps(num_rows, num_experts), dtype=torch.int32, device=expert_end_E.device)
    if num_rows:
        tile_maps_kernel[(num_experts + 1,)](
            expert_end_E, tile_maps_X, num_rows, num_experts, min(num_experts + 1, num_rows),
            SHORTEST=TILE_HEIGHTS[0], NUM_HEIGHTS=len(TILE_HEIGHTS), ALIGN=ALIGNED,
            EXPERTS=triton.next_power_of_2(num_experts), STEP=TILES_PER_STEP,
        )  # fmt: skip
    return RowOrder(order_N, expert_end_E, tile_maps_X)
