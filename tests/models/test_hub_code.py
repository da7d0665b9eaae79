"""A saved folder carries its code: it loads without hf_moe through `trust_remote_code`, with hf_moe without trust."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from spoilt_checkpoints import hub_cache
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from hf_moe import HfMoeForCausalLM, HfMoeModel
from hf_moe.hub.renew_code import note_of, renew_code
from hf_moe.models import modeling_hf_moe
from hf_moe.models.checkpoint_files import CheckpointError
from hf_moe.models.modeling_hf_moe import HfMoeForSequenceClassification
from hf_moe.models.shipped_code import code_note
from tiny_hf_moe import make_code_old, tiny_config

FILES = {"configuration_hf_moe.py", "modeling_hf_moe.py", "routing.py", "losses.py"}
FILES |= {"checkpoint_files.py", "checkpoint_layout.py", "hub_upload.py", "late_gradient.py", "shipped_code.py"}
FILES |= {"masks.py", "outputs.py", "transformers_names.py"}
AUTO_MAP = {
    "AutoConfig": "configuration_hf_moe.HfMoeConfig",
    "AutoModel": "modeling_hf_moe.HfMoeModel",
    "AutoModelForCausalLM": "modeling_hf_moe.HfMoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hf_moe.HfMoeForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hf_moe.HfMoeForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_hf_moe.HfMoeForQuestionAnswering",
}
OPTIONS = {"router_scoring": "sigmoid", "router_bias": True, "num_shared_experts": 1, "first_k_dense_replace": 1}


def auto_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["auto_map"]


@pytest.fixture(scope="module")
def hub_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub") / "model"
    HfMoeForCausalLM(tiny_config(**OPTIONS)).save_pretrained(folder, max_shard_size="20KB")
    return folder


@pytest.mark.parametrize("model_class", [HfMoeForCausalLM, HfMoeModel, HfMoeForSequenceClassification])
def test_every_class_saves_the_whole_map_and_all_files(model_class: type, tmp_path: Path) -> None:
    model_class(tiny_config()).save_pretrained(tmp_path)
    assert auto_map(tmp_path) == AUTO_MAP
    assert {path.name for path in tmp_path.glob("*.py")} == FILES


def test_the_folder_is_what_ships_with_a_checkpoint() -> None:
    folder = Path(modeling_hf_moe.__file__).parent
    assert {path.name for path in folder.iterdir() if path.is_file()} == FILES | {"__init__.py"}


def test_the_copied_files_stand_alone() -> None:
    """Only sibling files, and only packages that every user of transformers has."""
    modeling = Path(modeling_hf_moe.__file__)
    copied = {modeling, *map(Path, get_relative_import_files(modeling))}
    assert {path.name for path in copied} == FILES
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub"} | set(sys.stdlib_module_names)
    for path in copied:
        assert set(get_imports(path)) <= allowed
        nodes = ast.walk(ast.parse(path.read_text()))
        assert all(node.level <= 1 for node in nodes if isinstance(node, ast.ImportFrom))


# Runs where hf_moe cannot be imported; prints one JSON object
WITHOUT_HF_MOE = """
import json, sys
sys.modules["hf_moe"] = None
import torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
folder, again, logits = sys.argv[1:]
trust = {"trust_remote_code": True}
found = {}
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    found["untrusted"] = str(error)
tokens = torch.arange(16)[None]
config = AutoConfig.from_pretrained(folder, **trust)
for auto_class in (
    AutoModel, AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
):
    found[auto_class.__name__] = type(auto_class.from_pretrained(folder, **trust)).__module__
model = AutoModelForCausalLM.from_pretrained(folder, **trust)
with torch.no_grad():
    torch.save(model(tokens).logits, logits)
found["generated"] = model.generate(tokens, max_new_tokens=4, do_sample=False).tolist()
found["backend"] = model.config._experts_implementation
fresh = AutoModelForCausalLM.from_config(config, **trust)
fresh.load_state_dict(model.state_dict())
fresh.save_pretrained(again, max_shard_size="20KB")
reloaded = AutoModelForCausalLM.from_pretrained(again, **trust)
found["reloaded"] = all(torch.equal(value, reloaded.state_dict()[name]) for name, value in model.state_dict().items())
shard = sorted(path for path in __import__("pathlib").Path(again).glob("*.safetensors"))[-1]
shard.write_bytes(shard.read_bytes()[:-1])
try:
    AutoModelForCausalLM.from_pretrained(again, **trust)
except ValueError as error:
    found["truncated"] = str(error)
cached = AutoModelForCausalLM.from_pretrained("owner/name", **trust)
found["cached"] = torch.equal(cached(tokens).logits, model(tokens).logits)
cached.save_pretrained(again + "_cached")
found["saved_map"] = json.load(open(again + "_cached/config.json"))["auto_map"]
found["hf_moe"] = [name for name, module in sys.modules.items() if name.split(".")[0] == "hf_moe" and module]
print(json.dumps(found))
"""


def run_elsewhere(code: str, cwd: Path, *arguments: Path, **environment: str) -> Any:
    """Run `code` in a fresh process in another folder, this repository not on its path; what it prints, as JSON."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def without(hub_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process saw that has no hf_moe, and the folder that it saved."""
    folder = tmp_path_factory.mktemp("without")
    again, logits = folder / "again", folder / "logits.pt"
    hub_cache(hub_folder, folder / "home" / "hub")
    found = run_elsewhere(WITHOUT_HF_MOE, folder, hub_folder, again, logits, HF_HOME=str(folder / "home"))
    return found | {"folder": again, "logits": torch.load(logits)}


def test_without_hf_moe_it_needs_trust(without: dict[str, Any]) -> None:
    assert "trust_remote_code=True" in without["untrusted"]


def test_without_hf_moe_every_auto_class_loads(without: dict[str, Any]) -> None:
    assert without["hf_moe"] == []
    for auto_class in AUTO_MAP:
        if auto_class != "AutoConfig":
            assert without[auto_class].startswith("transformers_modules.")


def test_without_hf_moe_it_computes_the_same(without: dict[str, Any], hub_folder: Path) -> None:
    model = HfMoeForCausalLM.from_pretrained(hub_folder)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, without["logits"])
    assert model.generate(tokens, max_new_tokens=4, do_sample=False).tolist() == without["generated"]
    assert without["backend"] == model.config._experts_implementation


def test_without_hf_moe_it_saves_its_code_again(without: dict[str, Any], hub_folder: Path) -> None:
    assert without["reloaded"]
    assert auto_map(without["folder"]) == AUTO_MAP
    for name in FILES:
        assert (without["folder"] / name).read_bytes() == (hub_folder / name).read_bytes()


def test_without_hf_moe_a_repository_loads_and_is_saved_whole(without: dict[str, Any]) -> None:
    assert without["cached"]
    assert without["saved_map"] == AUTO_MAP


def test_without_hf_moe_a_cut_shard_is_refused(without: dict[str, Any]) -> None:
    assert "bytes are missing at its end" in without["truncated"]
    assert ".safetensors" in without["truncated"]


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], ids=str)
@pytest.mark.parametrize(
    "auto_class",
    [
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForQuestionAnswering,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    ],
)
def test_with_hf_moe_its_classes_win(auto_class: Any, options: dict[str, Any], hub_folder: Path) -> None:
    model = auto_class.from_pretrained(hub_folder, **options)
    assert type(model).__module__ == "hf_moe.models.modeling_hf_moe"
    assert type(AutoConfig.from_pretrained(hub_folder, **options)).__module__ == "hf_moe.models.configuration_hf_moe"


NOTE = "carries code of another version of hf_moe (modeling_hf_moe.py)"


def notes(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.name == "hf_moe.models.checkpoint_layout"]
    caplog.clear()
    return messages


@pytest.mark.parametrize("trust", [False, True])
def test_loading_says_that_the_folder_carries_other_code(
    trust: bool, hub_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(hub_folder, tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(folder)
    assert notes(caplog) == []
    make_code_old(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    (note,) = notes(caplog)
    assert str(folder) in note
    assert NOTE in note
    assert "renew_code(folder)" in note
    hub_cache(folder, tmp_path / "cache")
    AutoModelForCausalLM.from_pretrained("owner/name", cache_dir=tmp_path / "cache")
    assert NOTE in notes(caplog)[0]
    model.save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
    assert notes(caplog) == []


def test_code_is_renewed_without_the_weights(
    hub_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(hub_folder, tmp_path / "model")
    assert renew_code(folder) == []
    make_code_old(folder)
    monkeypatch.setattr("hf_moe.hub.renew_code.snapshot_download", lambda name, allow_patterns: str(folder))
    assert str(note_of("owner/name")).startswith(f"owner/name {NOTE}")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert renew_code(folder) == ["late_gradient.py", "modeling_hf_moe.py"]
    for name in FILES:
        assert (folder / name).read_text() == (hub_folder / name).read_text()
    # as git writes it on some machines
    modeling = folder / "modeling_hf_moe.py"
    modeling.write_bytes(modeling.read_bytes().replace(b"\n", b"\r\n"))
    assert code_note(folder) is None
    modeling.unlink()
    modeling.symlink_to(hub_folder / "losses.py")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        renew_code(folder)
    modeling.unlink()
    with pytest.raises(ValueError, match="carries no modeling_hf_moe"):
        renew_code(folder)
    (folder / "config.json").write_text('{"model_type": "olmoe"}')
    with pytest.raises(ValueError, match="no model of the hf_moe architecture"):
        renew_code(folder)


def test_a_class_of_ones_own_comes_with_its_own_file(tmp_path: Path) -> None:
    """A subclass in a user's module: that file is copied, and the map names it."""
    module = tmp_path / "my_model.py"
    module.write_text("from hf_moe import HfMoeForCausalLM\n\n\nclass MyModel(HfMoeForCausalLM):\n    pass\n")
    code = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from tiny_hf_moe import make_code_old, tiny_config
from my_model import MyModel
MyModel(tiny_config()).save_pretrained(sys.argv[1] + "/saved")
print(open(sys.argv[1] + "/saved/config.json").read().replace("\\n", ""))
"""
    tests = Path(__file__).parents[1]
    config = run_elsewhere(f"import sys; sys.path.insert(0, {str(tests.parent)!r})\n{code}", tmp_path, tmp_path, tests)
    assert config["auto_map"]["AutoModelForCausalLM"] == "my_model.MyModel"
    assert (tmp_path / "saved" / "my_model.py").exists()
