"""The experts benchmark at tiny sizes: right before timed, resumable, and docs/backends.md says what was measured."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface, grouped_mm_experts_forward

import hf_moe  # noqa: F401  registers the implementations
from benchmarks.expert_layers import command, contestants, results, timing
from benchmarks.expert_layers.bench import Bench, summary
from benchmarks.expert_layers.cases import Case, Layer, build_experts, build_inputs, cpu_plan, cuda_plan, quick
from benchmarks.expert_layers.clocks import FIRST_SLEEP, LONGEST_SLEEP, Contestant, CpuClock, CudaTimer
from benchmarks.expert_layers.correctness import Stacks, compared_experts, plain_torch
from benchmarks.expert_layers.report import (
    BEGIN,
    END,
    JSON,
    PAGE,
    page_section,
    plot_ratios,
    section_of,
    times_table,
    with_section,
)
from benchmarks.expert_layers.roofline import Device, decode_floor, floors
from benchmarks.expert_layers.targets import CPU, H100, verdict_table, verdicts
from benchmarks.expert_layers.timing import (
    MIN_ROUNDS,
    SLOW_ROUNDS,
    median_ratio,
    reached,
    saved_bytes,
    time_rounds,
)
from hf_moe import reference

ROOT = Path(__file__).resolve().parents[1]
TINY = Layer("tiny", "qwen3_moe", 64, 32, 4, 2)
OURS = "hf_moe_grouped"


@pytest.fixture(autouse=True)
def _backends_that_need_no_compiler(monkeypatch):
    """The benchmark is under test, not the backends: `hf_moe` runs what `hf_moe_grouped` runs."""
    monkeypatch.setattr(contestants, "chosen", lambda experts, case: {"runs": OURS, "because": "tested"})
    monkeypatch.setitem(ExpertsInterface._global_mapping, "hf_moe", ExpertsInterface._global_mapping[OURS])
    monkeypatch.setattr(timing, "ATTEMPTS", 1)  # other tests run beside these: every measurement would be repeated


def options(folder, *arguments):
    start = [
        "--quick",
        "--threads",
        "1",
        "--case-seconds",
        "0.001",
        "--output",
        str(folder),
        "--implementations",
        OURS,
    ]
    return command.parser(None).parse_args([*start, *arguments])


def load(folder):
    return json.loads((folder / "experts_cpu.json").read_text())


ONE_CASE = ("--tokens", "16", "--dtypes", "float32", "--modes", "train")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Results of every tiny CPU case."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ATTEMPTS", 1)
        assert command.run(options(folder)) == 0
    return folder


def test_results_say_what_was_measured_and_where(measured):
    data = load(measured)
    assert {"date", "device", "threads", "versions", "capability", "rules", "implementations"} <= set(data)
    assert {"python", "torch", "transformers", "hf-moe"} <= set(data["versions"])
    assert data["implementations"]["present"] == ["eager", "batched_mm", "grouped_mm", OURS]
    assert set(data["cases"]) == {case.key for case in quick(cpu_plan()).cases}
    for record in data["cases"].values():
        for name in data["implementations"]["present"]:
            facts = record["results"][name]
            assert facts["ms"] > 0
            assert facts["to_best_native"] > 0
            assert facts["to_dense_floor"] > 0
            assert facts["rounds"] >= SLOW_ROUNDS
            assert ("saved_bytes" in facts) == (record["mode"] != "forward")
        assert record["results"][record["best_native"]]["to_best_native"] == 1
        assert ("streaming floor" in record["floors_ms"]) == (record["mode"] == "forward")


@pytest.mark.long
def test_the_command_runs_as_a_script(tmp_path):
    arguments = [
        "--quick",
        "--threads",
        "1",
        "--case-seconds",
        "0",
        "--output",
        tmp_path,
        "--implementations",
        "eager",
    ]
    script = [sys.executable, ROOT / "benchmarks" / "experts.py", *arguments, "--tokens", "1", "--modes", "forward"]
    subprocess.run(script, check=True, capture_output=True, cwd=tmp_path)
    assert len(load(tmp_path)["cases"]) == 2


def _other_expert(self, hidden, index, weights):
    moved = index.clone()
    moved[0, 0] = (index[0, 0] + 1) % self.num_experts
    return grouped_mm_experts_forward(self, hidden, moved, weights)


WRONG = {
    "one slot goes to another expert": _other_expert,
    "one percent too much": lambda *call: 1.01 * grouped_mm_experts_forward(*call),
    "NaN": lambda *call: float("nan") * grouped_mm_experts_forward(*call),
    "no gradient of the routing weights": lambda self, hidden, index, weights: grouped_mm_experts_forward(
        self, hidden, index, weights.detach()
    ),
    "raises": lambda *call: torch.empty(2) @ torch.empty(3),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_a_wrong_implementation_is_not_timed_and_fails_the_run(wrong, dtype, tmp_path, monkeypatch):
    monkeypatch.setitem(ExpertsInterface._global_mapping, OURS, WRONG[wrong])
    arguments = ("--tokens", "16", "--dtypes", dtype, "--modes", "train")
    assert command.run(options(tmp_path, *arguments)) == 1
    for record in load(tmp_path)["cases"].values():
        assert set(record["results"][OURS]) == {"wrong"}
        assert record["results"]["grouped_mm"]["ms"] > 0


def test_a_refusal_has_its_reason_and_hf_moe_may_not_refuse(tmp_path, monkeypatch):
    run = options(tmp_path, *ONE_CASE, "--implementations", "hf_moe", "hf_moe_grouped", "hf_moe_cpu")
    monkeypatch.setattr(contestants, "refusal", lambda name, experts, case: "no" if name == "hf_moe_cpu" else None)
    assert command.run(run) == 0
    for record in load(tmp_path)["cases"].values():
        assert record["results"]["hf_moe_cpu"] == {"refused": "no"}
        assert record["results"]["hf_moe"]["runs"] == "hf_moe_grouped"
        assert record["results"]["hf_moe_grouped"] == {"skipped": "what hf_moe runs here"}
    monkeypatch.setattr(
        contestants, "refusal", lambda name, experts, case: "no" if name in ("hf_moe", "hf_moe_cpu") else None
    )
    run.fresh = True
    assert command.run(run) == 1


def test_what_is_not_registered_is_reported_as_absent(monkeypatch):
    monkeypatch.delitem(ExpertsInterface._global_mapping, "hf_moe_grouped")
    names, missing = command.present("cuda", None)
    assert "hf_moe_grouped" not in names
    assert missing["hf_moe_grouped"] == "not registered in transformers' ExpertsInterface"
    assert "not installed" in missing["scattermoe"]
    assert {"eager", "batched_mm", "grouped_mm"} <= set(names)


@pytest.mark.long
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    measure, calls = Bench.measure, []

    def interrupted(self, case, names, budget):
        calls.append(case.key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, case, names, budget)

    monkeypatch.setattr(Bench, "measure", interrupted)
    run = options(tmp_path, "--tokens", "1")
    with pytest.raises(KeyboardInterrupt):
        command.run(run)
    first = load(tmp_path)["cases"]
    assert list(first) == calls[:2]
    assert command.run(run) == 0
    second = load(tmp_path)["cases"]
    assert {key: second[key] for key in first} == first
    assert sorted(calls) == sorted([*second, calls[2]])  # the interrupted one twice, all others once
    monkeypatch.setattr(results, "source_hash", lambda device: "other code")
    assert command.run(run) == 0
    assert len(calls) == 2 * len(second) + 1


def test_results_of_another_machine_are_not_mixed(measured, tmp_path, capsys):
    data = load(measured) | {"device": "another machine"}
    (tmp_path / "experts_cpu.json").write_text(json.dumps(data))
    assert command.run(options(tmp_path, *ONE_CASE)) == 2
    assert "another machine there" in capsys.readouterr().out
    assert load(tmp_path) == data
    assert command.run(options(tmp_path, *ONE_CASE, "--fresh")) == 0
    assert load(tmp_path)["device"] != "another machine"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--experts", "7"), "no case of the plan"),
        (("--implementations", "liger", "eager"), "knows eager, .*, got liger"),  # on a GPU alone
        (("--report",), "does not exist: measure first"),
        (("--device", "cuda"), "needs a GPU"),
    ],
)
def test_what_measures_nothing_is_refused(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.run(options(tmp_path, *arguments)) == 2
    assert re.search(says, capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.long
def test_the_gpu_plan_runs_with_a_clock_of_the_cpu(tmp_path, monkeypatch):
    """Decoding and LoRA, through stock PEFT and accelerated, are compared with float64 like everything else."""
    cases = [replace(case, dtype="float32") for case in quick(cuda_plan()).cases]
    cases = [case for case in cases if case.layer.family == "qwen3_moe" or case.mode == "forward"]
    plan = replace(quick(cuda_plan()), device="cpu", cases=tuple(cases), case_seconds=0.001)
    names, missing = command.present("cuda", [OURS, "liger", "scattermoe"])
    header = {"plan": plan.name, "implementations": {"present": names, "absent": missing}}
    header["reached"] = dict(zip(("tflops", "tbs"), reached(CpuClock(), "cpu", size=64), strict=True))
    found = results.Results(tmp_path / "experts_cuda.json", "cuda", results.environment("cpu", 1), header)
    assert command.measure(plan, names, found, CpuClock(), Console(quiet=True)) == []
    modes = {record["mode"] for record in found.data["cases"].values()}
    assert modes == {"decode", "forward", "train", "frozen", "lora"}
    for record in found.data["cases"].values():
        assert record["roofline_ms"] > 0
        assert all(record["results"][name]["ms"] > 0 for name in ("grouped_mm", OURS)), record
    assert [verdict.says for verdict in verdicts(found.data)] == ["not measured"] * len(H100)
    assert "| roofline" not in times_table(found.data).splitlines()[0]


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_the_exact_result_is_the_definition(routing):
    experts = build_experts(TINY, torch.float32, "cpu")
    inputs = build_inputs(TINY, 9, routing, "cpu").to(torch.float64)
    exact = plain_torch(inputs, Stacks({"up": experts.gate_up_proj, "down": experts.down_proj}), torch.float64).tensors
    hidden, weights = inputs.hidden_TH.requires_grad_(), inputs.weights_TK.requires_grad_()
    up, down = (weight.detach().double().requires_grad_() for weight in (experts.gate_up_proj, experts.down_proj))
    out = reference.experts(hidden, inputs.index_TK, weights, up, down, F.silu)
    out.backward(inputs.grad_TH)
    torch.testing.assert_close(exact["out"], out.detach())
    torch.testing.assert_close(exact["hidden"], hidden.grad)
    torch.testing.assert_close(exact["weights"], weights.grad)
    for expert in range(TINY.num_experts):
        torch.testing.assert_close(exact[f"up[{expert}]"], up.grad[expert])
        torch.testing.assert_close(exact[f"down[{expert}]"], down.grad[expert])


def test_weights_are_the_same_in_every_dtype_and_inputs_are_seeded():
    in_float32, in_bfloat16 = (build_experts(TINY, dtype, "cpu") for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(in_float32.gate_up_proj, in_bfloat16.gate_up_proj.float())
    one, two = build_inputs(TINY, 9, "zipf", "cpu"), build_inputs(TINY, 9, "zipf", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert all(len(row.unique()) == TINY.top_k for row in one.index_TK)
    rows = torch.bincount(build_inputs(replace(TINY, num_experts=16), 512, "zipf", "cpu").index_TK.flatten())
    assert rows[0] > 4 * rows[15]


def test_weight_gradients_are_compared_for_the_fullest_and_the_emptiest_expert():
    index = torch.arange(64).repeat(3)[:150].view(-1, 2)
    index = torch.cat([index, torch.full((9, 2), 40)])
    compared = compared_experts(index, 65)
    assert {40, 64} <= set(compared)
    assert len(compared) == 8


class FakeDevice:
    """A device of 1 GHz: seconds of the CPU and of a queue; stands for torch.cuda and for its events."""

    def __init__(self):
        self.now = self.end_of_queue = 0.0

    def launch(self, seconds_to_queue, seconds_to_run):
        self.now += seconds_to_queue
        self.end_of_queue = max(self.now, self.end_of_queue) + seconds_to_run

    def _sleep(self, cycles):
        self.launch(0.0, cycles / 1e9)

    def synchronize(self):
        self.now = max(self.now, self.end_of_queue)

    def Event(self, enable_timing):  # noqa: N802  torch's name
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(self.now, self.end_of_queue))
        event.query = lambda: event.at <= self.now
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event


@pytest.mark.parametrize("launches", [1, 10, 100])
def test_what_the_cpu_needs_to_launch_is_not_counted_on_a_gpu(launches, monkeypatch):
    device, prepared = FakeDevice(), []
    monkeypatch.setattr(torch, "cuda", device)
    layer = Contestant(lambda: [device.launch(1e-3, 1e-5) for _ in range(launches)], lambda: prepared.append(1))
    timer = CudaTimer(layer, torch.empty(1))
    assert timer() == pytest.approx(launches * 1e-5)
    assert not timer.late
    assert FIRST_SLEEP <= timer.sleep < LONGEST_SLEEP
    assert timer.sleep / 1e9 >= launches * 1e-3 or launches == 1
    samples = len(prepared)  # every sample begins without gradients
    assert timer() == pytest.approx(launches * 1e-5)
    assert len(prepared) == samples + 1


def test_who_waits_for_the_gpu_is_named_as_late(monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(torch, "cuda", device)
    timer = CudaTimer(Contestant(lambda: (device.synchronize(), device.launch(1e-3, 1e-5))), torch.empty(1))
    assert [timer(), timer()] == pytest.approx([1e-3 + 1e-5] * 2)
    assert timer.late
    assert timer.sleep == FIRST_SLEEP


def test_who_waits_for_the_gpu_is_refused_before_a_capture_begins(monkeypatch):
    modes = []
    gpu = mock.MagicMock(set_sync_debug_mode=modes.append)

    def forward():
        if modes:
            raise RuntimeError("called a synchronizing CUDA operation")

    monkeypatch.setattr(torch, "cuda", gpu)
    with pytest.raises(RuntimeError, match="synchronizing"):
        timing.captured(forward)
    assert modes == ["error", "default"]
    gpu.graph.assert_not_called()


def test_every_value_is_read_once_for_the_streaming_floor(monkeypatch):
    monkeypatch.setattr(contestants, "MOST_VALUES_OF_A_DOT", 3)
    assert sum(contestants.streaming(56, "cpu")()) == 7


def test_no_case_begins_after_the_deadline_and_the_same_command_goes_on(tmp_path, capsys):
    chosen = ("--tokens", "1", "--dtypes", "float32", "--modes", "forward")
    assert command.run(options(tmp_path, *chosen, "--seconds", "0")) == 0
    assert "cases that are left: 1." in capsys.readouterr().out
    assert command.run(options(tmp_path, *chosen)) == 0
    assert len(load(tmp_path)["cases"]) == 1


class FakeTimer:
    """Every contestant takes what it says."""

    late = False

    def __init__(self, contestant):
        self.contestant = contestant

    def __call__(self):
        self.contestant.prepare()
        return self.contestant.run()


class FakeClock:
    timer = FakeTimer


def test_rounds_are_shared_and_slow_contestants_leave_early():
    state, times = [], iter(range(1, 1000))
    contestants_by_name = {
        "grouped_mm": Contestant(lambda: 1.0, lambda: state.append("prepared")),
        "eager": Contestant(lambda: 5.5),
        "ours": Contestant(lambda: 0.5 + 0.0 * next(times)),
    }
    found, late = time_rounds(contestants_by_name, FakeClock(), 0.0, ("eager", "grouped_mm"))
    assert late == set()
    assert {name: len(seconds) for name, seconds in found.items()} == {
        "grouped_mm": MIN_ROUNDS,
        "eager": SLOW_ROUNDS,
        "ours": MIN_ROUNDS,
    }
    assert len(state) == MIN_ROUNDS + 1
    assert next(times) == MIN_ROUNDS + 2  # a warm-up and the rounds


def test_a_disturbed_measurement_is_repeated(monkeypatch):
    # seconds used by all, by this process, and passed: others take a core, then a twentieth of one, then nothing
    used = iter([(0, 0, 0), (4, 2, 2), (4, 2, 2), (6.1, 4, 4), (6.1, 4, 4), (8.1, 6, 6)])
    monkeypatch.setattr(timing, "ATTEMPTS", 3)
    monkeypatch.setattr(timing, "_used_seconds", lambda: next(used))
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 2)
    found = timing.time_undisturbed({"eager": Contestant(lambda: 1.0)}, FakeClock(), 0.0, ("eager",))
    assert found.others <= 0.05
    assert len(list(used)) == 2
    assert len(found.seconds["eager"]) == MIN_ROUNDS


def test_ratios_are_medians_within_rounds():
    # a machine that is twice as slow in the last round leaves every ratio as it is
    times = {"grouped_mm": [2.0, 2.0, 4.0], "eager": [3.0, 3.0, 6.0], "ours": [1.0, 1.0, 2.0]}
    times["dense floor"] = [0.5, 0.5, 1.0]
    results = {"grouped_mm": {}, "eager": {}, "ours": {}, "absent": {"refused": "no"}}
    record = summary(timing.Timing(times, {"eager"}, others=0.0), results)
    assert [name for name, facts in record["results"].items() if "late" in facts] == ["eager"]
    assert record["best_native"] == "grouped_mm"
    assert record["floors_ms"] == {"dense floor": 500}
    assert record["results"]["ours"]["to_best_native"] == 0.5
    assert record["results"]["eager"]["to_dense_floor"] == 6
    assert record["results"]["absent"] == {"refused": "no"}
    assert median_ratio([1.0, 2.0], [2.0, 2.0, 9.0]) == 0.75


def test_saved_bytes_count_storages_once_and_no_parameters():
    layer = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer) == 16 * 8 * 4
    assert saved_bytes(lambda: layer(x[:2] * x[2:4]), layer) == (16 * 8 + 2 * 8) * 4
    assert saved_bytes(lambda: layer(x), torch.nn.Module()) == (16 * 8 + 4 * 8) * 4


def test_what_takes_out_of_proportion_is_skipped_with_the_reason():
    layer = Layer("h1024-i512", "qwen3_moe", 1024, 512, 64, 8)
    small, large = Case(layer, 1, "float32", "forward"), Case(layer, 512, "float32", "train")
    assert contestants.skip_reason("batched_mm", small, 8) is None
    assert "copies 72.0 GiB of weights" in contestants.skip_reason("batched_mm", large, 64)
    assert "writes 24.0 GiB of dense gradients" in contestants.skip_reason("eager", large, 64)
    assert contestants.skip_reason("eager", replace(large, mode="frozen"), 64) is None
    assert contestants.skip_reason("grouped_mm", large, 64) is None


def test_floors_are_those_that_the_targets_were_set_by():
    h100, qwen3 = Device(tflops=800, tbs=3.0), (2048, 768, 128, 8)
    found = floors(h100, qwen3, tokens=8192)
    assert found.forward == pytest.approx(0.773, abs=1e-3)
    assert found.train == pytest.approx(2.507, abs=1e-3)
    assert found.lora == pytest.approx(2.304, abs=1e-3)
    assert found.forward < found.frozen < found.lora < found.train
    assert found.saved_bytes / 1e6 == pytest.approx(235, abs=1)
    assert decode_floor(h100, qwen3, 1) == pytest.approx(0.025, abs=1e-3)
    assert decode_floor(h100, qwen3, 16) == pytest.approx(0.26, abs=2e-3)


def _record(value, tokens=16, mode="forward", saved=None):
    ours = {"ms": 1.0, "to_best_native": value} | ({"saved_bytes": saved} if saved else {})
    return {
        "layer": {"name": "h1024-i512", "num_experts": 64, "hidden_size": 1024, "width": 512, "top_k": 8},
        "tokens": tokens,
        "dtype": "float32",
        "mode": mode,
        "routing": "uniform",
        "best_native": "grouped_mm",
        "results": {"hf_moe": ours, "grouped_mm": {"to_best_native": 1.0, "saved_bytes": 1000}},
    }


def test_targets_are_met_missed_or_not_measured():
    cases = {"a": _record(0.6), "b": _record(0.71, tokens=64), "c": _record(0.7, 512, "train", saved=600)}
    found = {verdict.what: verdict for verdict in verdicts({"plan": "experts_cpu", "cases": cases})}
    assert len(found) == len(CPU)
    assert found["E=64, T=16 and 64, forward"][3:] == (0.71, "b")
    assert found["E=64, T=16 and 64, forward"].says == "missed"
    assert found["E=64, T=512, training"].says == "met"
    assert found["every size, dtype, mode"].says == "met"
    assert found["saved for backward, every size"].says == "met"
    assert found["E=64, T=1, forward"].says == "not measured"
    assert "| 0.71 | b | missed |" in verdict_table(found.values())


def test_the_page_section_follows_from_the_results_alone():
    cases = {"a": _record(0.6), "c": _record(0.7, 512, "train", saved=500)}
    data = {"plan": "experts_cpu", "device": "cpu, 2 cores", "threads": 2, "date": "2026-01-01", "cases": cases}
    data["versions"] = {"torch": "2.13.0", "transformers": "5.23.0"}
    section = page_section(data)
    assert section == page_section(json.loads(json.dumps(data)))
    assert "| 16 | 0.60 | - | - | - |\n| 512 | - | 0.70 | - | - |" in section
    assert "the worst 0.70 (c)" in section
    assert "Activations kept for backward: 50%" in section
    page = with_section(f"# x\n\n{BEGIN}\nold\n{END}\n\ny\n", section)
    assert section_of(page) == section
    assert with_section(page, section) == page
    assert page.endswith(f"{END}\n\ny\n")
    with pytest.raises(ValueError, match="must hold"):
        with_section("# x", section)


@pytest.mark.skipif(not (ROOT / JSON).exists(), reason="no results are committed")
def test_the_page_says_what_was_measured():
    data = json.loads((ROOT / JSON).read_text())
    assert section_of(PAGE.read_text()) == page_section(data)
    assert set(data["cases"]) == {case.key for case in cpu_plan().cases}
    for record in data["cases"].values():
        assert not [name for name, facts in record["results"].items() if "wrong" in facts]


def test_plots_are_the_same_bytes_for_the_same_results(measured, tmp_path):
    one, two = (plot_ratios(load(measured), tmp_path / name) for name in ("one", "two"))
    assert [path.name for path in one] == ["experts_cpu_tiny_E4.png"]
    assert one[0].read_bytes() == two[0].read_bytes()


def test_every_name_is_an_implementation_of_the_host():
    """A misspelt name would be reported as absent for ever."""
    assert set(contestants.OURS) <= set(ALL_EXPERTS_FUNCTIONS)
    assert {"batched_mm", "grouped_mm"} <= set(ALL_EXPERTS_FUNCTIONS)
