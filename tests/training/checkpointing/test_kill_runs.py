"""A few of the kills of benchmarks/kill_runs.py; all of them, with what came of them, are in its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_weights():
    """In a process of its own, which forks a child for each run: importing the libraries takes longer than a run."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    command = [sys.executable, str(TESTS / "killed_runs.py"), "--points", "5", "--random", "1", "--groups", "1"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found = json.loads(ended.stdout)
    assert len(found["runs"]) == 7
    assert all(run["identical"] for run in found["runs"])
    # the child saw the steps that matter
    steps = found["steps_of_a_save"]
    assert steps.count("fsync") > 8
    for step in ("half of optimizer.pt", "half of model.safetensors", "os.rename checkpoint-4"):
        assert step in steps


def test_the_long_form_was_run_and_survived():
    result = json.loads((TESTS.parent / "benchmarks" / "results" / "kill_runs.json").read_text(encoding="utf-8"))
    assert result["runs"] >= 50
    assert result["runs"] == result["resumed"] == result["identical_to_uninterrupted"]
    assert result["killed"]["before a step of a save"] == result["steps_of_a_save"]
