"""Tile tables: what is shipped is well formed and near, what is unknown or malformed is named, search is asked for."""

import json
import logging

import pytest
import torch

from hf_moe.kernels.triton import tiles
from hf_moe.kernels.triton.tiles import KERNELS, Tile, candidates, read_table, table, tile_for

DEVICES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "default")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def on_h100(monkeypatch):
    monkeypatch.setattr(tiles, "device_name", lambda device: "sm_90")


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_tiles_for_every_kernel(name):
    for kernel in KERNELS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert candidates(kernel, dtype, name)


def test_the_files_are_those_of_the_known_devices():
    assert {file.stem for file in tiles.FOLDER.glob("*.json")} == set(DEVICES)


@pytest.mark.parametrize("kernel", ["up", "grouped_linear", "backward_activation"])
def test_more_rows_per_expert_get_higher_tiles(kernel, on_h100):
    few, many = (tile_for(kernel, rows, 768, 2048, torch.bfloat16, CUDA) for rows in (4, 2048))
    assert few.block_m <= 16 < 64 <= many.block_m


def test_low_rank_gets_a_narrow_tile(on_h100):
    narrow, wide = (tile_for("grouped_linear", 512, n, 2048, torch.bfloat16, CUDA) for n in (16, 2048))
    assert narrow.block_n < wide.block_n


# (hidden, expert width, slots per token, experts)
LAYERS = {
    "Mixtral": (4096, 14336, 2, 8),
    "Qwen3-30B": (2048, 768, 8, 128),
    "OLMoE": (2048, 1024, 8, 64),
    "DeepSeek-V3": (7168, 2048, 8, 256),
}


@pytest.mark.parametrize("name", ["sm_90", "sm_100"])
@pytest.mark.parametrize("layer", LAYERS)
def test_weight_gradients_get_wide_tiles_when_rows_are_many(layer, name, monkeypatch):
    monkeypatch.setattr(tiles, "device_name", lambda device: name)
    hidden, width, top_k, num_experts = LAYERS[layer]

    def blocks(tokens: int, n: int, k: int) -> tuple[int, int, int]:
        tile = tile_for("weight_gradient", tokens * top_k // num_experts, n, k, torch.bfloat16, CUDA)
        return tile.block_m, tile.block_n, tile.block_k

    for n, k in ((hidden, 2 * width), (width, hidden)):  # of up and down
        assert blocks(8192, n, k) == (128, 256, 64)
        assert blocks(64 * num_experts // top_k, n, k)[:2] != (128, 256)
    assert blocks(8192, hidden, 16) == (32, 128, 64)  # factors of LoRA
    assert blocks(8192, 16, hidden) == (128, 32, 64)


@pytest.mark.parametrize(("n", "k"), [(2044, 768), (768, 2044)])
def test_widths_of_no_whole_loads_get_tiles_that_do_not_spill_there(n, k, on_h100):
    for kernel in tiles.KERNELS:
        chosen = tiles.tile_for(kernel, 512, n, k, torch.bfloat16, torch.device("cuda"))
        assert chosen in tiles.candidates(kernel, torch.bfloat16, "default")


def test_no_rows_are_a_shape_too(on_h100):
    assert tile_for("up", 0, 768, 2048, torch.bfloat16, CUDA) == tile_for("up", 1, 768, 2048, torch.bfloat16, CUDA)


def test_the_interpreter_gets_small_tiles():
    tile = tile_for("up", 4096, 768, 2048, torch.bfloat16, CPU)
    assert max(tile.block_m, tile.block_n, tile.block_k) <= 32


def test_an_unknown_device_gets_conservative_tiles_and_one_line(caplog):
    tiles.table.cache_clear()
    with caplog.at_level(logging.WARNING, "hf_moe.kernels.triton.tiles"):
        assert table("sm_75") == read_table(tiles.FOLDER / "default.json")
        table("sm_75")
    assert len(caplog.messages) == 1
    assert "sm_75" in caplog.text
    assert "sm_90" in caplog.text


def test_unknown_kernel_and_dtype_are_refused():
    with pytest.raises(ValueError, match=r"one of up, grouped_linear.*got 'gate'"):
        tile_for("gate", 16, 64, 64, torch.bfloat16, CPU)
    with pytest.raises(ValueError, match=r"got torch.float64: cast the model"):
        tile_for("up", 16, 64, 64, torch.float64, CPU)


def change(content, entry):
    content["up"]["16-bit"][0] = entry
    return content


ENTRY = {"rows_per_expert": 16, "n": 8, "k": 8, "tile": [16, 16, 16, 4, 2]}
MALFORMED = {
    "unknown kernel": (lambda content: content | {"down": {}}, "must hold the kernels"),
    "kernel missing": (lambda content: {"up": content["up"]}, "must hold the kernels"),
    "no entries": (lambda content: content | {"up": {"16-bit": []}}, "must list entries"),
    "misspelt key": (lambda content: change(content, {"rows": 16, "n": 8, "k": 8, "tile": [16] * 5}), "an entry has"),
    "short tile": (lambda content: change(content, ENTRY | {"tile": [16, 16]}), "tile with 5 numbers"),
    "no power of two": (lambda content: change(content, ENTRY | {"tile": [48, 16, 16, 4, 2]}), "powers of two"),
    "no map": (lambda content: change(content, ENTRY | {"tile": [256, 16, 16, 4, 2]}), "block_m must be one of"),
    "text": (lambda content: change(content, ENTRY | {"n": "8"}), "positive integers"),
    "zero": (lambda content: change(content, ENTRY | {"tile": [16, 16, 16, 0, 2]}), "positive integers"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_table_is_refused_with_its_name(case, tmp_path):
    break_it, rule = MALFORMED[case]
    path = tmp_path / "sm_90.json"
    path.write_text(json.dumps(break_it(json.loads((tiles.FOLDER / "sm_90.json").read_text()))))
    with pytest.raises(ValueError, match=rule) as error:
        read_table(path)
    assert str(path) in str(error.value)


def test_search_takes_the_fastest_tile_once(on_h100, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setenv(tiles.AUTOTUNE, "1")
    monkeypatch.setattr(tiles, "_found", {})
    launched: list[Tile] = []

    def milliseconds(run, **_):
        run()
        return 1.0 if launched[-1].block_m == 64 else 2.0

    monkeypatch.setattr(triton.testing, "do_bench", milliseconds)
    for capturing in (False, True):  # what was timed before a capture is known in it
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        tile = tile_for("up", 100, 768, 2048, torch.bfloat16, CUDA, launch=launched.append)
        assert tile.block_m == 64
    assert launched == candidates("up", torch.bfloat16, "sm_90")
    with pytest.raises(RuntimeError, match=r"HF_MOE_AUTOTUNE=1 times up for 3 rows an expert.*or unset it"):
        tile_for("up", 3, 768, 2048, torch.bfloat16, CUDA, launch=launched.append)


def test_search_is_off_by_default(on_h100):
    assert not tiles.autotune_is_on()
    tile_for("up", 100, 768, 2048, torch.bfloat16, CUDA, launch=lambda tile: pytest.fail("launched"))


def test_search_on_a_cpu_and_an_unknown_value_are_refused(monkeypatch):
    monkeypatch.setenv(tiles.AUTOTUNE, "1")
    with pytest.raises(RuntimeError, match="unset it"):
        tile_for("up", 100, 768, 2048, torch.bfloat16, CPU)
    monkeypatch.setenv(tiles.AUTOTUNE, "yes")
    with pytest.raises(ValueError, match="must be 0"):
        tile_for("up", 100, 768, 2048, torch.bfloat16, CPU)
