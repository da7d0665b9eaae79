"""The tracing benchmark at tiny sizes: every case, every target, and a recording that miscounts is not timed."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tracing(monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), str(ROOT), *sys.path])
    import tracing
    from expert_layers import timing

    monkeypatch.setattr(timing, "ATTEMPTS", 1)  # other tests run beside this: every measurement would be repeated
    threads = torch.get_num_threads()
    yield tracing
    torch.set_num_threads(threads)


def options(tracing, output):
    return tracing.parser().parse_args(
        ["--quick", "--case-seconds", "0.01", "--threads", "1", "--output", str(output / "tracing.json")]
    )


def test_every_case_is_measured_and_every_target_judged(tracing, tmp_path):
    assert tracing.run(options(tracing, tmp_path)) == 0
    data = json.loads((tmp_path / "tracing.json").read_text())
    assert list(data["cases"]) == ["step of 64 tokens", "forward of 64 tokens", "forward of 1 token"]
    for case in data["cases"].values():
        assert {"plain", "plain again", "counts", "tokens", "used_by_others"} == set(case)
        assert case["plain"]["to_plain"] == 1
    assert [verdict["met"] in (True, False) for verdict in data["targets"]] == [True, True]
    assert {"date", "device", "versions", "threads", "rules", "model"} <= data.keys()


def test_a_wrong_count_is_not_timed(tracing, tmp_path, monkeypatch):
    from hf_moe.observability import layer_sums

    right = layer_sums.LayerSums.add
    monkeypatch.setattr(
        layer_sums.LayerSums,
        "add",
        lambda self, routing: [right(self, routing) for _ in range(2)],
    )
    with pytest.raises(tracing.WrongResultError, match="counts"):
        tracing.run(options(tracing, tmp_path))
    assert not (tmp_path / "tracing.json").exists()
