"""A save that is cut off at any point leaves a folder that holds one model, the old or the new, or that is refused."""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from spoilt_checkpoints import UP, assert_same_tensors, build, stored
from transformers import modeling_utils

from hf_moe.models.checkpoint_files import CheckpointError
from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM

FINISHED = 7


def save_and_die(model: Any, folder: Path, shard_size: str, step: int) -> bool:
    """Save in another process that dies before its change number `step` to a file; whether it lived to the end."""
    child = os.fork()
    if child == 0:
        steps = itertools.count()
        write = modeling_utils.safe_save_file

        def count() -> None:
            if next(steps) == step:
                os._exit(0)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
            if (writes or event in ("os.remove", "os.rename")) and str(arguments[0]).startswith(str(folder)):
                count()

        modeling_utils.safe_save_file = lambda *args, **kwargs: (count(), write(*args, **kwargs))
        sys.addaudithook(watch)
        try:
            model.save_pretrained(folder, max_shard_size=shard_size)
        finally:
            os._exit(FINISHED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == FINISHED


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("new_size", ["1GB", "8KB"], ids=["to_one_file", "to_shards"])
@pytest.mark.parametrize("old_size", [None, "1GB", "8KB"], ids=["nothing", "one_file", "shards"])
def test_a_killed_save_is_never_another_model(old_size: str | None, new_size: str, tmp_path: Path) -> None:
    """Same shapes, other values and another config: only the rules on files tell the two models apart."""
    old, new = build(), build(seed=1, num_experts_per_tok=1)
    refused = 0
    for step in itertools.count():
        folder = tmp_path / str(step)
        if old_size is not None:
            old.save_pretrained(folder, max_shard_size=old_size)
        finished = save_and_die(new, folder, new_size, step)
        try:
            loaded = HfMoeForCausalLM.from_pretrained(folder)
        except (CheckpointError, OSError):
            refused += 1
        else:
            assert_same_tensors(loaded, new if loaded.config.num_experts_per_tok == 1 else old)
        if finished:
            break
    assert refused > 2
    assert_same_tensors(HfMoeForCausalLM.from_pretrained(folder), new)
    assert not list(folder.glob("*.superseded"))


def test_an_unfinished_save_names_the_model_that_was_there(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    assert not save_and_die(build(seed=1), tmp_path, "1GB", 2)
    with pytest.raises(CheckpointError, match=r"unfinished save.*model\.safetensors\.superseded"):
        HfMoeForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert_same_tensors(HfMoeForCausalLM.from_pretrained(tmp_path), model)


def test_a_save_that_the_host_refuses_costs_nothing(single: Path) -> None:
    model = HfMoeForCausalLM.from_pretrained(single)
    model.generation_config.temperature = -1.0
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(single)
    assert_same_tensors(HfMoeForCausalLM.from_pretrained(single), model)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_cut_and_every_lost_file_is_refused(layout: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """At the start, the end and both sides of every tensor of one file; and each weight file gone."""
    folder = Path(shutil.copytree(saved[layout], tmp_path / "checkpoint"))
    file = stored(folder)[UP]
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    bounds = {
        start + offset for name, entry in header.items() if name != "__metadata__" for offset in entry["data_offsets"]
    }
    for cut in sorted({0, 4, 8, start - 1} | {bound + step for bound in bounds for step in (-1, 0, 1)}):
        if cut == len(data):
            continue
        file.write_bytes((data + b"\0")[:cut])
        with pytest.raises(CheckpointError, match=file.name):
            HfMoeForCausalLM.from_pretrained(folder)
    file.write_bytes(data)
    for lost in [*folder.glob("*.safetensors*"), folder / "config.json"]:
        content = lost.read_bytes()
        lost.unlink()
        with pytest.raises((CheckpointError, OSError, ValueError)):
            HfMoeForCausalLM.from_pretrained(folder)
        lost.write_bytes(content)
    assert HfMoeForCausalLM.from_pretrained(folder) is not None


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_save_never_writes_through_a_link(name: str, tmp_path: Path) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "model"
    victim.write_text("keep")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link to .*victim"):
        build().save_pretrained(folder)
    assert victim.read_text() == "keep"
    assert [path.name for path in folder.iterdir()] == [name]
