"""The server or the client is killed in the middle of a push: the same push goes on with what is missing."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_moe.hub import push
from hf_moe.hub.errors import HubError

from .conftest import save_tiny

PUSH = "import sys, hf_moe.cli.push; from hf_moe.cli.common import main; main(sys.argv[1:])"
ROOT = Path(__file__).resolve().parents[2]


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


def test_a_server_that_is_gone_and_a_second_try(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
    save_tiny(tmp_path / "model", seed=1)
    hub.kill()
    hub.start(slow=1.0)
    api = hub.api()
    plan = push.plan_push(tmp_path / "model", "alice/gone", api=api)
    errors: list[HubError] = []

    def upload() -> None:
        try:
            push.send(plan, api=api)
        except HubError as error:
            errors.append(error)

    uploading = threading.Thread(target=upload)
    uploading.start()
    wait_for(hub.lfs_parts)
    hub.kill()
    uploading.join(timeout=60)
    assert "Give the same command again" in str(errors[0])
    hub.start()
    plan = push.plan_push(tmp_path / "model", "alice/gone", api=api)
    assert push.verify(plan, push.send(plan, api=api), api=api)


@pytest.mark.slow
def test_a_client_that_is_killed_sends_only_what_is_missing(hub, tmp_path):
    save_tiny(tmp_path / "model", seed=2, max_shard_size="20KB")
    hub.kill()
    hub.start(slow=1.0)
    command = [sys.executable, "-c", PUSH, "push", str(tmp_path / "model"), "alice/killed"]
    environment = hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
    client = subprocess.Popen(command, env=environment, cwd=tmp_path)
    wait_for(lambda: puts(hub))
    client.kill()
    client.wait()
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
