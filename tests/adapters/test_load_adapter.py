"""An adapter from elsewhere gives exactly what its file holds, or an error that names what is wrong."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_moe.adapters.expert_lora import ParamWrapper as AcceleratedParamWrapper
from hf_moe.adapters.frozen_router import RouterNotFrozenError, save_router_hash
from hf_moe.adapters.load_adapter import CONFIG, WEIGHTS, AdapterError, load_adapter
from tiny_moe import hf_moe_model, qwen_model, with_expert_lora

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def saved(tmp_path):
    """An adapter on experts with weights that do something, and its base's logits with it."""
    model = with_expert_lora(qwen_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    save_router_hash(tmp_path / "adapter", model)
    return tmp_path / "adapter", model.eval()(input_ids=IDS).logits


def test_it_loads_what_was_saved(saved):
    folder, logits = saved
    loaded = load_adapter(qwen_model(), folder)
    torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert any(isinstance(module, AcceleratedParamWrapper) for module in loaded.modules())


def test_it_can_be_trained_on(saved):
    assert any(p.requires_grad for p in load_adapter(qwen_model(), saved[0], "law", is_trainable=True).parameters())


def test_another_router_is_refused_when_asked_for(saved):
    with pytest.raises(RouterNotFrozenError, match="router"):
        load_adapter(qwen_model(seed=1), saved[0], strict_router=True)


def config(**changes):
    def spoil(folder):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def weights(change):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        first = sorted(tensors)[0]
        change(tensors, first)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def set_nan(tensors, first):
    tensors[first][0, 0] = float("nan")


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def cut(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1])


BROKEN = {
    "huge rank": (config(r=10**9), "r in .* integer from 1 to"),
    "rank of another type": (config(r="4"), "got '4'"),
    "huge rank by pattern": (config(rank_pattern={"x": 10**9}), "rank_pattern in"),
    "rank explained by no element": (
        lambda folder: [
            weights(lambda tensors, first: tensors.update(e=torch.empty(0, 10**9)))(folder),
            config(r=10**9)(folder),
        ],
        "r in .* integer from 1 to",
    ),
    "no rank": (config(r=0), "r in .* integer from 1 to .* got 0"),
    "negative rank": (config(r=-1), "r in .* integer from 1 to"),
    "huge prompt": (config(num_virtual_tokens=10**9), "num_virtual_tokens in .* must be null"),
    "another library's module": (
        config(megatron_config={"a": 1}, megatron_core="os"),
        "megatron_config .* must be null",
    ),
    "a field of another type": (config(use_dora=7), "use_dora .* true or false, got 7"),
    "layers copied": (config(layer_replication=[[0, 10**9]]), "layer_replication .* must be null, got .*deeper model"),
    "dropout not a number": (config(lora_dropout=float("nan")), "lora_dropout .* finite number, got nan"),
    "an integer without end": (config(lora_alpha=10**400), "lora_alpha .* finite number"),
    "alpha of another type": (config(lora_alpha="4"), "lora_alpha .* finite number, got '4'"),
    "alpha not a number": (config(lora_alpha=float("nan")), "lora_alpha .* finite number, got nan"),
    "alpha infinite by pattern": (config(alpha_pattern={"x": float("inf")}), "alpha_pattern .* finite"),
    "unknown method": (config(peft_type="EVIL"), "EVIL"),
    "no json": (lambda folder: (folder / CONFIG).write_text("{"), "not valid JSON"),
    "nested json": (lambda folder: (folder / CONFIG).write_text("[" * 10**5), "not valid JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "must be a mapping"),
    "large config": (lambda folder: (folder / CONFIG).write_text(" " * (5 * 2**20)), "at most"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
    "a pickle": (pickled, "is a pickle, which can run code"),
    "one byte cut off": (cut, "1 bytes are missing"),
    "git-lfs pointer": (
        lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "nan": (weights(set_nan), "NaN or infinite"),
    "missing tensor": (weights(lambda tensors, first: tensors.pop(first)), "lacks .* would be new weights"),
    "surplus tensor": (weights(lambda tensors, first: tensors.update({f"{first}.x": torch.ones(1)})), "no place for"),
    "a router of the base": (
        weights(
            lambda tensors, first: tensors.update(
                {"base_model.model.model.layers.0.mlp.gate.weight": torch.ones(8, 32)}
            )
        ),
        "mlp.gate.weight.* belongs to the base",
    ),
    "wrong shape": (
        weights(lambda tensors, first: tensors.update({first: tensors[first][:-1].clone()})),
        "does not fit",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused(case, saved):
    spoil, message = BROKEN[case]
    spoil(saved[0])
    with pytest.raises(AdapterError, match=message):
        load_adapter(qwen_model(), saved[0])


@pytest.mark.parametrize("name", ["a/b", "../..", "", "a.b", "x" * 65])
def test_a_name_that_is_no_name(name, saved):
    with pytest.raises(AdapterError, match="1 to 64 letters"):
        load_adapter(qwen_model(), saved[0], name)


def test_an_adapter_of_another_model(saved):
    with pytest.raises(AdapterError):
        load_adapter(hf_moe_model(hidden_size=16), saved[0])


def test_a_folder_has_no_revision(saved):
    with pytest.raises(AdapterError, match="is a folder, which has no revision 'v1'"):
        load_adapter(qwen_model(), saved[0], revision="v1")


def test_no_such_adapter(tmp_path):
    with pytest.raises(AdapterError, match="neither a folder nor on the Hub"):
        load_adapter(qwen_model(), tmp_path / "absent")


def test_the_folder_above_is_told_from_the_adapter(saved):
    with pytest.raises(AdapterError, match=r"such as .*adapter"):
        load_adapter(qwen_model(), saved[0].parent)
