"""One loading function: whole models, and every refusal in a sentence before a weight is read."""

from unittest.mock import Mock

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from hf_moe.adapters.load_adapter import AdapterError, load_adapter
from hf_moe.comparison.run import ModelChoice, load_model
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.loading.auto_classes import is_language_model, named_auto_class, whole_auto_class
from hf_moe.loading.pretrained import ModelError, ModelNotFoundError, find_model, load_language_model
from hf_moe.observability.explain import explain_config
from tiny_models import build_tiny, tiny_config
from tiny_multimodal import MULTIMODAL, multimodal_config
from tiny_unseen import dbrx, doge, llama4, switch


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_the_whole_class_is_chosen(kind):
    """AutoModelForCausalLM, which knows some of them as well (Qwen3.5-MoE, Dots3), loads their text model alone."""
    config = multimodal_config(kind)
    named = type(config).__name__.removesuffix("Config")
    for architectures in (None, ["SomebodyElsesModel"]):
        config.architectures = architectures
        assert whole_auto_class(config).__name__ in ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    explained = explain_config(config)
    assert explained.model_class.startswith(named) or kind.startswith(("dots3", "minimax", "diffusion", "inkling"))
    assert "Text" not in explained.model_class


def test_what_a_checkpoint_names_decides():
    config = multimodal_config("qwen3_5_moe")
    config.architectures = ["Qwen3_5MoeForCausalLM"]
    assert named_auto_class(config) is transformers.AutoModelForCausalLM
    config = tiny_config("mixtral")
    config.architectures = ["MixtralForSequenceClassification"]
    assert named_auto_class(config) is transformers.AutoModelForSequenceClassification
    assert not is_language_model(named_auto_class(config), config)


@pytest.mark.parametrize("build", [llama4, switch, dbrx, doge], ids=lambda build: build.__name__)
def test_trace_and_compare_name_experts_that_they_do_not_see(build, tmp_path):
    build().config.save_pretrained(tmp_path)
    with pytest.raises(EvaluationError, match="outside of transformers' experts interface") as raised:
        load_model(ModelChoice(str(tmp_path)))
    assert "Mixture-of-Experts model" not in str(raised.value)


def test_a_config_without_a_model_is_reported_in_a_sentence(tmp_path):
    """5,000 characters of configuration classes until now."""
    transformers.VitPoseBackboneConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has no model for the model type 'vitpose_backbone'") as raised:
        load_language_model(str(tmp_path))
    assert len(str(raised.value)) < 400


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    """Its language model's head was drawn at random, and trained."""
    model, _ = build_tiny("qwen3_moe")
    model.model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no language model"):
        load_language_model(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("Qwen3MoeModel", "Qwen3MoeForCausalLM"))
    with pytest.raises(
        ModelError, match=r"lacks lm_head.weight \(1 tensors in all\): they would be newly initialised"
    ):
        load_language_model(str(tmp_path))


def refusing(error):
    def model_info(self, name, **options):
        raise error

    return model_info


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (HTTPError("no route"), "the Hub cannot be reached"),
        (ConnectionError("no route"), "the Hub cannot be reached"),
        (OfflineModeIsEnabled("off"), "HF_HUB_OFFLINE is set"),
        (RepositoryNotFoundError("none", response=Mock()), "the Hub has none that this account may see"),
    ],
)
def test_a_name_is_asked_for_once(error, words, monkeypatch, tmp_path):
    """transformers asks six times and waits longer each time: 45 seconds without a network."""
    monkeypatch.setattr(HfApi, "model_info", refusing(error))
    monkeypatch.setattr("hf_moe.loading.config_files.AutoConfig", None)
    with pytest.raises(ModelNotFoundError, match=f"no folder here is called 'nobody/nothing', and {words}"):
        find_model("nobody/nothing")
    with pytest.raises(OSError, match="Check the spelling"):  # what transformers raises is one as well
        explain_config("nobody/nothing")
    find_model(str(tmp_path))  # a folder needs no Hub


def test_a_folder_that_is_not_there_is_no_name_on_the_hub(tmp_path):
    with pytest.raises(ModelNotFoundError, match="it is no name on the Hub"):
        find_model(str(tmp_path / "absent"))


def test_an_adapter_is_asked_for_once(monkeypatch):
    monkeypatch.setattr(HfApi, "model_info", refusing(ConnectionError("no route")))
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(AdapterError, match="'nobody/nothing', and the Hub cannot be reached"):
        load_adapter(build_tiny("qwen3_moe")[0], "nobody/nothing")


def test_a_cached_commit_is_found_without_the_hub(monkeypatch, tmp_path):
    """Of a pinned revision the cache knows the commit, and of no branch."""
    commit = "c0ffee" * 6 + "c0ff"
    folder = tmp_path / "models--nobody--nothing" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "model_info", refusing(OfflineModeIsEnabled("off")))
    find_model("nobody/nothing", file="adapter_config.json", revision=commit)
    with pytest.raises(ModelNotFoundError, match="HF_HUB_OFFLINE is set"):
        find_model("nobody/nothing", file="adapter_config.json")


def test_dtype_and_backend_reach_the_loader(tmp_path):
    model, _ = build_tiny("mixtral")
    model.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path), dtype="bfloat16", experts_implementation="hf_moe")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._experts_implementation == "hf_moe"
    with pytest.raises(ModelError, match=r"cannot be loaded: .*nope.* is not supported"):
        load_language_model(str(tmp_path), experts_implementation="nope")
