"""Sorting of routed rows and row tiles, against a stable torch sort."""

import pytest
import torch

from hf_moe.kernels.triton import routing
from hf_moe.kernels.triton.tiles import TILE_HEIGHTS
from numerics import ROUTINGS

LARGE = {
    "many_blocks": lambda: torch.randint(0, 9, (331, 3)),
    "more_experts_than_bins": lambda: torch.randint(0, 70, (50, 2)),
}
INDICES = {name: (lambda make=make: make().index) for name, make in ROUTINGS.items()} | LARGE


def experts_of(index: torch.Tensor) -> int:
    return max(int(index.max()) if index.numel() else 0, 3) + 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("name", INDICES)
def test_rows_are_sorted_by_expert_and_ties_by_slot(name, dtype, device):
    index = INDICES[name]().to(device, dtype)
    num_experts = experts_of(index)
    order, expert_end, _ = routing.sort_rows(index, num_experts, num_experts)
    assert order.dtype == expert_end.dtype == torch.int32
    assert torch.equal(order.long(), index.reshape(-1).argsort(stable=True))
    counts = torch.bincount(index.reshape(-1), minlength=num_experts)
    assert torch.equal(expert_end.long(), counts.cumsum(0))


def test_sentinel_slots_come_last(device):
    index = ROUTINGS["sentinels"]().index.to(device)
    order, expert_end, _ = routing.sort_rows(index, 4, 5)
    assert torch.equal(order.long(), index.reshape(-1).argsort(stable=True))
    assert expert_end.tolist() == [int((index <= expert).sum()) for expert in range(4)]
    assert expert_end[-1] < order.numel()


def expected_tiles(ends: list[int], num_rows: int, block_m: int) -> list[tuple[int, int]]:
    tiles = []
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        tiles += [(expert, row) for row in range(start, end, block_m)]
    return tiles + [(-1, row) for row in range(ends[-1], num_rows, block_m)]


@pytest.mark.parametrize("name", INDICES)
def test_tiles_of_every_height_cover_every_row_once(name, device):
    index = INDICES[name]().to(device)
    num_experts = experts_of(index) - (name == "sentinels")
    order = routing.sort_rows(index, num_experts, num_experts + 1)
    for block_m in TILE_HEIGHTS:
        tiles = order.tiles(block_m)
        assert tiles.expert_M.numel() == -(-index.numel() // block_m) + min(num_experts + 1, index.numel())
        wanted = expected_tiles(order.expert_end_E.tolist(), index.numel(), block_m)
        wanted += [(-1, -1)] * (tiles.expert_M.numel() - len(wanted))
        assert list(zip(tiles.expert_M.tolist(), tiles.row_M.tolist(), strict=True)) == wanted
        offsets = [part.storage_offset() * part.element_size() for part in tiles]
        assert all(offset % 16 == 0 for offset in offsets), "another alignment is another compilation"


def test_other_heights_are_refused(device):
    order = routing.sort_rows(torch.zeros(3, 1, dtype=torch.int64, device=device), 4, 4)
    with pytest.raises(ValueError, match=r"row tiles are \(16, .*\) rows high, got 48"):
        order.tiles(48)


@pytest.mark.parametrize("wrong", [-1, 4, 7])
def test_ids_out_of_range_raise(wrong, interpreter):
    index = torch.tensor([[0, 3], [wrong, 1]])
    with pytest.raises(IndexError, match=rf"expert ids must be in \[0, 4\), got {wrong}"):
        routing.sort_rows(index, 4, 4)


def test_number_of_ids_must_fit_the_experts(device):
    with pytest.raises(ValueError, match=r"num_ids must be 4 .* or 5 .*, got 6"):
        routing.sort_rows(torch.zeros(1, 1, dtype=torch.int64, device=device), 4, 6)


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setattr(routing.triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match=r"need tensors on a GPU, got device cpu.*TRITON_INTERPRET=1"):
        routing.sort_rows(torch.zeros(1, 1, dtype=torch.int64), 4, 4)


@pytest.mark.gpu
def test_sort_and_tiles_are_captured_in_a_graph():
    index = torch.randint(0, 128, (8192, 8), device="cuda")
    routing.sort_rows(index, 128, 128)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        order = routing.sort_rows(index, 128, 128)
        tiles = order.tiles(64)
    index.copy_(torch.randint(0, 128, index.shape, device="cuda"))
    graph.replay()
    assert torch.equal(order.order_N.long(), index.reshape(-1).argsort(stable=True))
    wanted = expected_tiles(order.expert_end_E.tolist(), index.numel(), 64)
    got = zip(tiles.expert_M.tolist(), tiles.row_M.tolist(), strict=True)
    assert list(got)[: len(wanted)] == wanted
