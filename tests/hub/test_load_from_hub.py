"""`model.push_to_hub`, and loading by name, in processes that see the Hub and the cache as a user's does."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from hf_moe import HfMoeForCausalLM
from hf_moe.models.hub_upload import superseded_weights
from tiny_hf_moe import random_ids

from .conftest import save_tiny

TESTS = Path(__file__).resolve().parents[1]

# two pushes of different models, the second sharded; then loading without trust. Prints one JSON object
WITH_HF_MOE = """
import json, sys, tempfile
import torch
import hf_moe
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM
from hub.conftest import save_tiny
from tiny_hf_moe import random_ids
commits = []
with tempfile.TemporaryDirectory() as folder:
    for seed, size in ((0, "1GB"), (1, "20KB")):
        model = save_tiny(f"{folder}/{seed}", seed=seed)
        commits.append(model.push_to_hub("plain", max_shard_size=size, private=True).oid)
    model.save_pretrained(f"{folder}/saved", push_to_hub=True, repo_id="saved", max_shard_size="20KB")
    save_tiny(f"{folder}/other", seed=0).save_pretrained(f"{folder}/again", push_to_hub=True, repo_id="saved")
    pull = model.push_to_hub("saved", revision="next", max_shard_size="20KB")
api = HfApi()
repos = ("alice/plain", "alice/saved")
print(json.dumps({
    "commits": commits,
    "files": {repo: [file.rfilename for file in api.model_info(repo).siblings] for repo in repos},
    "branch": [file.rfilename for file in api.model_info("alice/saved", revision="next").siblings],
    "logits": [
        AutoModelForCausalLM.from_pretrained("alice/plain", revision=commit)(random_ids()).logits.tolist()
        for commit in (None, commits[0])
    ],
    "class": AutoModelForCausalLM.from_pretrained("alice/saved").__module__,
}))
"""

WITHOUT_HF_MOE = """
import importlib.util, json, sys
assert importlib.util.find_spec("hf_moe") is None
import torch
from transformers import AutoModelForCausalLM
commit, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
try:
    AutoModelForCausalLM.from_pretrained("alice/plain", trust_remote_code=False)
except ValueError as error:
    untrusted = str(error)
trust = {"trust_remote_code": True}
found = [AutoModelForCausalLM.from_pretrained("alice/plain", revision=each, **trust) for each in (None, commit)]
print(json.dumps({
    "untrusted": untrusted, "module": type(found[0]).__module__,
    "logits": [model(ids).logits.tolist() for model in found],
}))
"""


def environment_without_hf_moe(folder: Path) -> Path:
    """The interpreter of a new virtual environment with the libraries of this one, but not hf_moe."""
    venv.create(folder, with_pip=False)
    libraries = Path(sysconfig.get_paths()["purelib"])
    if (libraries / "hf_moe").exists():
        pytest.skip("hf_moe lies among the libraries: an editable install leaves it out of a second environment")
    # an editable install is a .pth file of these, and .pth files are read in the environment's own folder alone
    (path,) = folder.glob("lib/python*/site-packages")
    (path / "libraries.pth").write_text(f"{libraries}\n")
    return folder / "bin" / "python"


def run(code: str, environment: dict[str, str], *arguments: str, python: Path = Path(sys.executable)):
    command = [str(python), "-c", code, *arguments]
    Path(environment["HF_HOME"]).mkdir(exist_ok=True)
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, cwd=environment["HF_HOME"]
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(servers, tmp_path_factory):
    hub, home = servers("xet"), tmp_path_factory.mktemp("home")
    paths = f"{TESTS.parent}:{TESTS}"
    with_hf_moe = run(WITH_HF_MOE, hub.environment(home / "with") | {"PYTHONPATH": paths})
    arguments = (with_hf_moe["commits"][0], json.dumps(random_ids().tolist()))
    python = environment_without_hf_moe(home / "venv")
    without = run(WITHOUT_HF_MOE, hub.environment(home / "without"), *arguments, python=python)
    return {"with": with_hf_moe, "without": without, "log": hub.log()}


@pytest.fixture(scope="module")
def logits(tmp_path_factory):
    """Of the second push and of the first, computed here."""
    folder = tmp_path_factory.mktemp("models")
    models = [save_tiny(folder / str(seed), seed=seed) for seed in (1, 0)]
    assert all(isinstance(model, HfMoeForCausalLM) for model in models)
    with torch.no_grad():
        return [model(random_ids()).logits for model in models]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["with", "without"])
def test_the_last_push_is_loaded_and_the_first_when_it_is_pinned(found, logits, where):
    for actual, expected in zip(found[where]["logits"], logits, strict=True):
        torch.testing.assert_close(torch.tensor(actual), expected)  # loaded weights lie at other addresses


@pytest.mark.slow
def test_push_to_hub_leaves_no_old_weights(found):
    files = found["with"]["files"]
    assert "model.safetensors" not in files["alice/plain"]
    assert "model.safetensors.index.json" in files["alice/plain"]
    assert [name for name in files["alice/saved"] if "safetensors" in name] == ["model.safetensors"]
    assert "model.safetensors" not in found["with"]["branch"]
    assert {"modeling_hf_moe.py", "README.md", "config.json"} <= set(files["alice/plain"])
    assert sum("/commit/main" in line["path"] for line in found["log"]) == 4, "each push is one commit"


@pytest.mark.slow
def test_with_hf_moe_no_trust_is_needed_and_without_it_is(found):
    assert found["with"]["class"] == "hf_moe.models.modeling_hf_moe"
    assert "trust_remote_code=True" in found["without"]["untrusted"]
    assert found["without"]["module"].startswith("transformers_modules.")


def test_which_weights_a_push_supersedes():
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    remote = ["model.safetensors", "pytorch_model.bin", "adapter_model.bin", "model.fp16.safetensors", "README.md"]
    assert superseded_weights(remote, [*shards, "config.json"]) == ["model.safetensors", "pytorch_model.bin"]
    assert superseded_weights(remote, ["adapter_model.safetensors"]) == ["adapter_model.bin"]
    assert superseded_weights([*shards, "model.safetensors.index.json"], ["model.safetensors"]) == [
        *shards,
        "model.safetensors.index.json",
    ]
    assert superseded_weights(remote, ["config.json"]) == []
    assert superseded_weights(["sub/model.safetensors"], ["model.safetensors"]) == []
