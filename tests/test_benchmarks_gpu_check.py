"""The first minutes on a GPU, tried on a CPU: nothing wrong is timed, crashes cost a part, predictions are held."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

import triton_interpreter
from benchmarks.gpu_checks import checks, command, predictions, products, tables, times
from benchmarks.gpu_checks.setting import GPU, SWEPT_TILES, TINY, Sizes
from hf_moe.kernels.triton import tiles
from hf_moe.kernels.triton.ops import triton_experts
from hf_moe.kernels.triton.tiles import Tile

ROOT = Path(__file__).resolve().parents[1]
if triton_interpreter.is_on():
    triton_interpreter.repair()
needs_interpreter = pytest.mark.skipif(not triton_interpreter.is_on(), reason="the dry run of a machine without a GPU")


@pytest.mark.long
@needs_interpreter
def test_every_stage_runs_from_a_checkout_that_is_not_installed(tmp_path):
    """The stage of .ci/run, elsewhere."""
    program = [sys.executable, ROOT / "benchmarks" / "gpu_check.py", "--tiny", "--output", tmp_path / "out"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(program, check=True, cwd=tmp_path, env=environment, timeout=280)
    files = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    names = ("facts", "checks", "experts_cuda", "sweep", "profile")
    assert set(files) == {"summary.txt", *(f"{name}.json" for name in names)}
    data = {name: json.loads(files[f"{name}.json"]) for name in names}
    assert {"date", "device", "versions", "commit"} <= set(data["facts"])
    assert all(record["objection"] is None for record in data["checks"])
    assert {case["mode"] for case in data["experts_cuda"]["cases"].values()} == {"forward", "lora", "decode"}
    assert all(case["results"]["hf_moe_triton"]["ms"] > 0 for case in data["experts_cuda"]["cases"].values())
    swept = {launch for launch, facts in data["sweep"].items() if facts["kernel"]}
    assert swept == {"up", "up, pre stored", "down", "backward_activation", "dX", "dW up", "dW down"}
    assert all(len(data["sweep"][launch]["ms"]) == 2 for launch in swept)
    assert set(data["profile"]) == {"forward", "train", "lora", "decode, one token"}


@needs_interpreter
def test_a_wrong_operator_is_named_and_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "triton_experts", lambda call: 1.03 * triton_experts(call))
    wrong, right = "triton: wide", "routing: E=4 T=8 torch.int64"
    chosen = {name: check for name, check in checks.checks_of(TINY).items() if name in (wrong, right)}
    monkeypatch.setattr(checks, "checks_of", lambda setting: chosen)
    checks.run_part(TINY, 0, tmp_path / "checks.jsonl", until=time.time() + 100)
    found = {record["name"]: record for record in checks.collected(TINY, tmp_path / "checks.jsonl")}
    assert found[right]["objection"] is None
    assert "allowed" in found[wrong]["objection"]
    assert found[wrong]["share_of_allowed_error"] > 1
    assert checks.wrong_operators(list(found.values())) == {"triton"}
    assert times.contestants({"triton"}) == ["hf_moe_grouped", "liger", "scattermoe"]


def test_a_crash_is_known_by_name_and_what_was_not_reached_is_not_right(tmp_path, monkeypatch):
    operators = {"one": "triton", "two": "hybrid", "three": "lora"}
    parts = {name: checks.Check(operator, dict) for name, operator in operators.items()}
    monkeypatch.setattr(checks, "checks_of", lambda setting: parts)
    lines = [
        {"name": "one", "operator": "triton", "objection": checks.CRASHED},
        {"name": "one", "operator": "triton", "objection": None},
        {"name": "two", "operator": "hybrid", "objection": checks.CRASHED, "part": 1},
    ]
    path = tmp_path / "checks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"name": "thr')  # the disk was full
    found = {record["name"]: record["objection"] for record in checks.collected(TINY, path)}
    assert found == {"one": None, "two": checks.CRASHED, "three": checks.UNREACHED}
    assert checks.wrong_operators(checks.collected(TINY, path)) == {"hybrid"}
    stopped = checks.collected(TINY, path, {1})  # by us, out of time: the benchmark may time it
    assert (stopped[1]["objection"], checks.wrong_operators(stopped)) == (checks.STOPPED, set())
    assert times.contestants({"hybrid"}) == ["hf_moe", "hf_moe_triton", "liger", "scattermoe"]
    assert checks.wrong_operators([{"operator": "routing", "objection": "no"}]) >= {"triton", "lora"}


STAGES_THAT_FAIL = """
import os, sys, time
stage = sys.argv[sys.argv.index("--stage") + 1]
print(stage, flush=True)
if stage == "times":
    os.abort()
if stage == "sweep":
    time.sleep(60)
"""


def test_a_stage_that_crashes_or_hangs_costs_that_stage(tmp_path, monkeypatch, capsys):
    (tmp_path / "program.py").write_text(STAGES_THAT_FAIL)
    monkeypatch.setattr(command, "PROGRAM", tmp_path / "program.py")
    monkeypatch.setattr(command, "PATIENCE", 0.0)
    options = command.parser(None).parse_args(["--tiny", "--output", str(tmp_path / "out"), "--seconds", "0"])
    assert command.run(options) == 1
    lines = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert "times tiny ended with -6" in lines
    assert "sweep  was stopped: out of time" in lines
    assert [line.partition(":")[0] for line in lines if line.endswith(" s")] == ["check", "times", "sweep", "profile"]
    assert all(record["objection"] for record in json.loads((tmp_path / "out" / "checks.json").read_text()))
    assert command.run(options) == 2  # results of two runs are not mixed
    assert "give an empty folder" in capsys.readouterr().err
    options.output = tmp_path / "program.py"
    assert command.run(options) == 2
    assert "results cannot be written" in capsys.readouterr().err


def test_a_run_that_is_stopped_from_outside_keeps_what_it_found(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(command, "PROGRAM", tmp_path / "program.py")
    monkeypatch.setattr(command.Run, "_wait", mock.Mock(side_effect=KeyboardInterrupt))
    options = command.parser(None).parse_args(["--tiny", "--output", str(tmp_path / "out")])
    (tmp_path / "out").mkdir()
    line = {"name": "lora: rank 4", "operator": "lora", "objection": None}
    (tmp_path / "out" / command.LINES).write_text(json.dumps(line) + "\n")
    assert command.run(options) == 1
    assert "stopped from outside: the rest was not run" in (tmp_path / "out" / "summary.txt").read_text()
    found = {record["name"]: record["objection"] for record in json.loads((tmp_path / "out/checks.json").read_text())}
    assert found["lora: rank 4"] is None


@pytest.mark.parametrize(
    ("facts", "says"), [({}, "no sweep of a GPU"), ({"tile_table": "sm_80"}, "a sweep for sm_80")]
)
def test_a_table_is_made_of_a_sweep_on_its_own_device(facts, says, tmp_path, capsys):
    for name, content in (("facts", facts), ("sweep", {})):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert command.write_tiles(tmp_path, "sm_90") == 2
    assert says in capsys.readouterr().err


def test_the_sweep_holds_tiles_that_launchers_take():
    assert set(SWEPT_TILES) == set(products.LAUNCHERS) <= set(tiles.KERNELS)
    for kernel, candidates in SWEPT_TILES.items():
        assert len(set(candidates)) == len(candidates)
        assert Tile(128, 256, 64, 8, 3) in candidates or kernel == "up"
        assert kernel not in tiles.ROW_TILED or {tile.block_m for tile in candidates} <= set(tiles.TILE_HEIGHTS)
    assert all(products.tiles_of(TINY, kernel) for kernel in SWEPT_TILES)
    assert [title for title in map(products.title, SWEPT_TILES["up"]) if tables.numbers(title)[3] == 16]
    assert GPU.few.slots * (GPU.tokens // 8) // GPU.few.experts == GPU.swept.slots * GPU.tokens // GPU.swept.experts


def test_a_sweep_makes_table_entries(tmp_path):
    shape = {"kernel": "up", "shape": [512, 768, 2048], "shipped": "128x128x64, 16 warps, 3 stages"}
    fast, slow = "128x64x64, 8 warps, 4 stages", "64x64x64, 4 warps, 4 stages"
    sweep = {
        # the tile with the least sum wins, not the one that is best in one launch
        "up": shape | {"ms": {"shipped": 1.0, fast: 0.7, slow: 0.6}},
        "up, pre stored": shape | {"ms": {"shipped": 1.2, fast: 0.8, slow: 1.5}},
        # within the noise: stays as it is
        "down": {"kernel": "grouped_linear", "shape": [512, 2048, 768], "ms": {"shipped": 1.0, fast: 0.99}},
        "dW up": {"kernel": "weight_gradient", "shape": [256, 1024, 1024], "ms": {"shipped": 1.0, fast: 0.5}},
        "routing": {"kernel": None, "shape": [512, 768, 2048], "ms": {"shipped": 0.02}},
    }
    before = json.loads((tiles.FOLDER / "sm_90.json").read_text())
    tables.write_table(tables.table_from(sweep, "sm_90"), tmp_path / "sm_90.json")
    after = tiles.read_table(tmp_path / "sm_90.json")
    nearest = {
        kernel: min(after[kernel]["16-bit"], key=lambda entry: entry.distance(*at)).tile
        for kernel, at in (("up", (512, 768, 2048)), ("weight_gradient", (256, 1024, 1024)))
    }
    assert nearest == dict.fromkeys(nearest, Tile(128, 64, 64, 8, 4))
    assert len(after["up"]["16-bit"]) == len(before["up"]["16-bit"]) + 1
    assert len(after["weight_gradient"]["16-bit"]) == len(before["weight_gradient"]["16-bit"])  # replaced
    assert json.loads((tmp_path / "sm_90.json").read_text())["grouped_linear"] == before["grouped_linear"]
    with pytest.raises(ValueError, match="copy the table of the nearest device"):
        tables.table_from(sweep, "sm_999")


def test_the_shipped_tables_are_written_as_they_are_read(tmp_path):
    for path in tiles.FOLDER.glob("*.json"):
        tables.write_table(json.loads(path.read_text()), tmp_path / path.name)
        assert (tmp_path / path.name).read_text() == path.read_text()


def test_a_prediction_that_does_not_hold_names_its_assumption():
    data = json.loads(predictions.PREDICTIONS.read_text())
    for prediction in data["predictions"]:
        assert prediction["rests_on"] in data["assumptions"]
        assert 0 < prediction["low"] < prediction["high"]
    key = "Qwen3-30B-A3B E=128 T=8192 bfloat16 forward uniform"
    case = {"hf_moe": {"ms": 1.5, "runs": "hf_moe_triton"}, "hf_moe_triton": {"skipped": "what hf_moe runs here"}}
    run = {
        "facts": {"device": "NVIDIA H200"},
        "experts_cuda": {"cases": {key: {"results": case}}, "reached": {"tflops": 780, "tbs": 4.1}},
        "sweep": {
            "down": {"shipped": "128x128x64, 8 warps, 3 stages", "ms": {"128x128x64, 8 warps, 3 stages": 0.9}},
            "dX": {"shipped": "128x256x64, 8 warps, 3 stages", "ms": {"128x256x64, 8 warps, 3 stages": 0.8}},
        },
    }
    found = predictions.verdicts(run, "NVIDIA H200")
    held = {verdict.prediction["of"]: verdict.inside for verdict in found}
    assert held == {
        "a large product, TFLOP/s": True,
        "a large copy, TB/s": True,
        "Qwen3 forward, ms": True,  # made for the tiles of `down` that the run shipped
        "down at 128x128x64, 8 warps, 3 stages, ms": False,
        "dX at 128x256x64, 8 warps, 3 stages, ms": True,
    }
    lines = command.summary(run)
    assert [line for line in lines if "WRONG in 1 of 2" in line and "from L2 to the multiprocessors" in line]
    assert "    down at 128x128x64, 8 warps, 3 stages, ms: 0.9, above 0.43 to 0.73" in lines
    assert command.summary(run | {"facts": {"device": "cpu"}})[-1].endswith("cpu: 0 were made, none was measured")
    (line,) = command.summary({"facts": run["facts"]})
    assert line.startswith("predictions for NVIDIA H200: ")
    assert " 0 were made" not in line


@needs_interpreter
def test_shapes_of_the_sweep_are_those_that_launchers_ask_with(monkeypatch):
    asked = []

    def recorded(kernel, *shape, **options):
        asked.append((kernel, shape[:3]))
        return tiles.tile_for(kernel, *shape)

    for module in products.LAUNCHERS.values():
        monkeypatch.setattr(module, "tile_for", recorded)
    for product in products.products_of(Sizes(32, 16, 2, 2), 4, torch.bfloat16, "cpu").values():
        product.launch()
        assert asked == ([(product.kernel, product.shape)] if product.kernel else [])
        asked.clear()


@needs_interpreter
def test_predictions_name_cases_launches_and_tiles_that_a_run_measures():
    cases = {case.key for case in GPU.plan().cases}
    launches = set(products.products_of(TINY.few, 2, torch.bfloat16, "cpu"))
    titles = {"shipped", *(products.title(tile) for found in SWEPT_TILES.values() for tile in found)}
    for prediction in json.loads(predictions.PREDICTIONS.read_text())["predictions"]:
        assert set(prediction.get("tiles", {})) <= launches
        for file, *place in prediction["where"]:
            if file == "sweep":
                assert place[0] in launches, prediction["of"]
                assert place[2] in titles, prediction["of"]
            else:
                assert place[0] == "reached" or place[1] in cases, prediction["of"]
