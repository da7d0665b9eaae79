"""The adapters benchmark at tiny sizes: every case, every target, and nothing wrong is timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sys
sys.path[:0] = ["benchmarks", "."]
import adapters
from expert_layers import timing
timing.ATTEMPTS = 1  # other tests run beside this: every measurement would be repeated
{spoil}
options = adapters.parser().parse_args(["--quick", "--case-seconds", "0.1", "--threads", "1", "--output", sys.argv[1]])
sys.exit(adapters.run(options))
"""


def run(output: Path, spoil: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN.format(spoil=spoil), str(output)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_every_case_is_measured_and_every_target_judged(tmp_path):
    done = run(tmp_path / "adapters.json")
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "adapters.json").read_text())
    assert len(data["cases"]) == 6
    assert [target["met"] in (True, False) for target in data["targets"]] == [True] * 6
    step = data["cases"]["float32, step of 256 tokens"]
    assert set(step["accelerated"]["ms_to"]) == {"frozen (grouped_mm)", "frozen (hf_moe)", "stock PEFT"}
    assert all(step[name]["peak_mb"] > 0 for name in ("accelerated", "stock PEFT"))
    assert {"date", "device", "versions", "threads", "rules", "backend", "distances"} <= data.keys()


@pytest.mark.slow
def test_a_wrong_result_is_not_timed(tmp_path):
    spoil = """
from hf_moe.adapters import expert_lora
right = expert_lora.factors_of
expert_lora.factors_of = lambda wrapper, adapter: right(wrapper, adapter)._replace(scale=2.01)
"""
    done = run(tmp_path / "adapters.json", spoil)
    assert done.returncode != 0
    assert "WrongResultError: accelerated in torch.float32 is off by" in done.stderr
    assert not (tmp_path / "adapters.json").exists()
