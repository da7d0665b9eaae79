"""The server or the client is killed in the middle of a push: the same push continues with what is missing."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_moe.hub import push
from hf_moe.hub.errors import HubError
from hub_server.client import start_push

from .conftest import save_tiny

both_paths = pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)


def puts(hub) -> list[str]:
    """Objects whose upload was answered with 200, in order."""
    return [line["path"] for line in hub.log() if line["method"] == "PUT" and line.get("status") == 200]


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_a_server_that_dies_and_comes_back(hub, tmp_path):
    save_tiny(tmp_path / "model")
    hub.kill()
    hub.start(slow=1.0)  # about four seconds for the weights
    api = hub.api()
    plan = push.plan_push(tmp_path / "model", "alice/back", api=api)
    uploading = threading.Thread(target=lambda: done.append(push.send(plan, api=api)))
    done: list[push.Pushed] = []
    uploading.start()
    wait_for(hub.lfs_parts)
    hub.kill()
    hub.start()
    uploading.join(timeout=60)
    assert done
    assert push.verify(plan, done[0], api=api)


def push_until_the_server_dies(hub, folder: Path, repo_id: str, at) -> None:
    """Kill the server once `at()` is true; what was being sent must end in one clear error."""
    api = hub.api()
    plan = push.plan_push(folder, repo_id, api=api)
    errors: list[HubError] = []

    def upload() -> None:
        try:
            push.send(plan, api=api)
        except HubError as error:
            errors.append(error)

    uploading = threading.Thread(target=upload)
    uploading.start()
    wait_for(at)
    hub.kill()
    uploading.join(timeout=60)
    assert "Give the same command again" in str(errors[0])


def test_a_server_that_is_gone_and_a_second_try(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    save_tiny(tmp_path / "model", seed=1)
    hub.kill()
    hub.start(slow=1.0)
    push_until_the_server_dies(hub, tmp_path / "model", "alice/gone", hub.lfs_parts)
    hub.start()
    api = hub.api()
    plan = push.plan_push(tmp_path / "model", "alice/gone", api=api)
    assert push.verify(plan, push.send(plan, api=api), api=api)


def commits(hub) -> list[str]:
    return [line["path"] for line in hub.log() if "/commit/" in line["path"]]


def stored_bytes(hub) -> int:
    """Of weights, in whichever store; xet writes a new index (`shards`) each time."""
    stores = ("lfs", "cas/xet/xorbs/xorbs")
    found = [path for store in stores for path in (hub.root / store).rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in found)


def assert_that_the_commit_alone_is_sent(hub, folder: Path, repo_id: str) -> None:
    """After an interruption with all objects there. The server was restarted, and so was its log."""
    api, before = hub.api(), stored_bytes(hub)
    assert before > 100_000
    assert [file.rfilename for file in api.model_info(repo_id).siblings] == [".gitattributes"], "no half commit"
    plan = push.plan_push(folder, repo_id, api=api)
    pushed = push.send(plan, api=api)
    assert (len(puts(hub)), len(commits(hub))) == (0, 1)
    assert stored_bytes(hub) == before, "weights were sent again"
    assert push.verify(plan, pushed, api=api)


@both_paths
def test_a_server_that_dies_before_the_commit(hub, tmp_path):
    save_tiny(tmp_path / "model", seed=3, max_shard_size="20KB")
    hub.kill()
    hub.start(hold=600)
    push_until_the_server_dies(hub, tmp_path / "model", "alice/uncommitted", lambda: commits(hub))
    hub.start()
    assert_that_the_commit_alone_is_sent(hub, tmp_path / "model", "alice/uncommitted")


@pytest.mark.slow
def test_a_client_that_is_killed_between_two_objects(hub, tmp_path):
    save_tiny(tmp_path / "model", seed=2, max_shard_size="20KB")
    hub.kill()
    hub.start(slow=1.0)
    client = start_push(hub, tmp_path / "model", "alice/killed")
    wait_for(lambda: puts(hub))
    client.kill()
    client.join()
    arrived = set(puts(hub))
    shards = len(list((tmp_path / "model").glob("*.safetensors")))
    assert 0 < len(arrived) < shards, "the kill came too late to test anything"
    api = hub.api()
    assert {file.rfilename for file in api.model_info("alice/killed").siblings} == {".gitattributes"}, "no half commit"
    time.sleep(1.5)  # what was on the way when the client died arrives
    before = puts(hub)
    plan = push.plan_push(tmp_path / "model", "alice/killed", api=api)
    pushed = push.send(plan, api=api)
    sent = set(puts(hub)[len(before) :])
    assert not sent & set(before)
    assert len(sent) + len(set(before)) == shards
    assert push.verify(plan, pushed, api=api)


@pytest.mark.slow
@both_paths
def test_a_client_that_is_killed_before_the_commit(hub, tmp_path):
    save_tiny(tmp_path / "model", seed=4, max_shard_size="20KB")
    hub.kill()
    hub.start(hold=600)
    client = start_push(hub, tmp_path / "model", "alice/killed-late")
    wait_for(lambda: commits(hub))
    client.kill()
    client.join()
    hub.kill()
    hub.start()
    assert_that_the_commit_alone_is_sent(hub, tmp_path / "model", "alice/killed-late")
