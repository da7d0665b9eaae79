"""A run of stages continues where it stopped, or refuses and says why."""

import json

import pytest

from hf_moe.io.run_lock import LOCK
from hf_moe.io.stages import ResumableRun, RunRefusedError

IDENTITY = {"seed": 0, "sizes": (1, 2), "rate": 0.1}


def run(folder, identity=IDENTITY):
    return ResumableRun(folder, "demo", identity)


def test_each_stage_runs_once_and_its_result_is_exact(tmp_path):
    calls = []

    def work():
        calls.append(1)
        return {"value": 0.1 + 0.2, "items": (1, 2)}

    with run(tmp_path / "out") as first:
        result = first.stage("a", work)
        assert not first.continued
    with run(tmp_path / "out") as second:
        assert second.stage("a", work) == result == {"value": 0.1 + 0.2, "items": [1, 2]}
        assert second.continued
        assert second.seconds["a"] >= 0
        assert second.interrupted == []
    assert len(calls) == 1


def test_a_stage_that_failed_runs_again_and_is_named(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with run(tmp_path) as first:
        first.stage("a", lambda: 1)
        with pytest.raises(KeyboardInterrupt):
            first.stage("b", fail)
    with run(tmp_path) as second:
        assert second.finished("a")
        assert not second.finished("b")
        assert second.stage("b", lambda: 2) == 2
        assert second.interrupted == ["b"]


def test_other_arguments_are_refused_by_name(tmp_path):
    with run(tmp_path) as first:
        first.stage("a", lambda: 1)
    with pytest.raises(RunRefusedError, match=r"seed was 0, is 1; rate was 0.1, is None.*choose another --output"):
        run(tmp_path, {"seed": 1, "sizes": [1, 2]}).__enter__()


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "thesis.doc").write_text("x")
    with pytest.raises(RunRefusedError, match=r"not empty \(it holds 'thesis.doc'\)"):
        run(tmp_path).__enter__()
    with pytest.raises(RunRefusedError, match="is a file"):
        run(tmp_path / "thesis.doc").__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]


def test_leftovers_of_a_very_early_kill_are_no_obstacle(tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / ".demo.json.hf_moe.tmp").write_text('{"prog')
    with run(tmp_path) as again:
        assert again.stage("a", lambda: 1) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": {}}', '"x"'])
def test_a_damaged_state_is_refused(content, tmp_path):
    (tmp_path / "demo.json").write_text(content)
    with pytest.raises(RunRefusedError, match=r"is damaged .* Delete the folder"):
        run(tmp_path).__enter__()


def test_missing_results_of_a_finished_stage_are_refused(tmp_path):
    with run(tmp_path) as first:
        first.stage("a", lambda: (tmp_path / "model").mkdir(), leaves=("model",))
    (tmp_path / "model").rmdir()
    with pytest.raises(RunRefusedError, match=r"'model' is missing .* the stage 'a'"), run(tmp_path) as second:
        second.stage("a", lambda: 1, leaves=("model",))


def test_two_runs_in_one_folder_are_refused(tmp_path):
    """The lock is of the open file: within a process it holds as between two."""
    with run(tmp_path), pytest.raises(RunRefusedError, match=r"another run works in .*: demo \(process"):
        run(tmp_path).__enter__()
    with run(tmp_path) as free:
        assert free.stage("a", lambda: 1) == 1


def test_state_is_plain_json(tmp_path):
    with run(tmp_path) as first:
        first.stage("a", lambda: 1)
    state = json.loads((tmp_path / "demo.json").read_text())
    assert state["identity"]["sizes"] == [1, 2]
