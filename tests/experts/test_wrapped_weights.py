"""Weights of a tensor class with a storage of its own: what `explain` says is what runs."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

import hf_moe
from hf_moe.adapters.expert_lora import MergeError, merge_and_check
from hf_moe.experts import backends
from tiny_lora import fill
from tiny_models import build_tiny
from tiny_moe import with_expert_lora


class Int8Values(torch.Tensor):
    """float32 to whoever asks, eight bits a value inside; like torchao's, it knows torch's operators alone."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values_of, self.scale = values, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().max() / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def plain(self):
        return self.values_of.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace != "aten":
            raise NotImplementedError(f"Int8Values dispatch: {function}")
        if function is torch.ops.aten.detach.default:
            return cls(args[0].values_of, args[0].scale)
        args, kwargs = tree_map_only(cls, cls.plain, (args, kwargs or {}))
        return function(*args, **kwargs)


@pytest.fixture
def models():
    """A tiny model with such expert weights, the same with their values in plain tensors, and inputs."""
    wrapped, inputs = build_tiny("mixtral")
    plain, _ = build_tiny("mixtral")
    for layers in zip(hf_moe.moe_layers(wrapped), hf_moe.moe_layers(plain), strict=True):
        for name in ("gate_up_proj", "down_proj"):
            weight = Int8Values.of(getattr(layers[1].experts, name).detach())
            for layer, stored in zip(layers, (weight, weight.plain()), strict=True):
                setattr(layer.experts, name, nn.Parameter(stored, requires_grad=False))
    return wrapped, plain, inputs


@pytest.mark.parametrize("name", ["eager", "hf_moe", "hf_moe_reference"])
def test_runs_and_is_explained(models, name, caplog):
    wrapped, plain, inputs = models
    backends._log_choice.cache_clear()
    wrapped.set_experts_implementation(name)
    torch.testing.assert_close(wrapped(**inputs).logits, plain(**inputs).logits)
    explained = hf_moe.explain(wrapped)
    assert "Expert weights are stored as Int8Values" in str(explained)
    sentence = "hf_moe runs hf_moe_grouped: hf_moe_cpu has no operators for weights stored as Int8Values"
    assert (sentence in str(explained)) == (sentence in caplog.text) == (name == "hf_moe")
    assert explained.refusals.keys() >= {"hf_moe_cpu", "hf_moe_triton"}
    assert not explained.refusals.keys() & {"eager", "hf_moe", "hf_moe_grouped", "hf_moe_reference"}


@pytest.mark.parametrize("name", ["hf_moe_cpu", "hf_moe_triton"])
def test_asked_for_by_name_it_is_refused(models, name):
    wrapped, _, inputs = models
    wrapped.set_experts_implementation(name)
    with pytest.raises(
        ValueError, match=f"'{name}' cannot run .*: {name} has no operators for .* Int8Values: use 'hf_moe_grouped'"
    ):
        wrapped(**inputs)
    assert f"The backend in use refuses: {hf_moe.explain(wrapped).refusals[name]}" in str(hf_moe.explain(wrapped))


def test_adapters_on_them_are_accelerated_and_not_merged(models):
    tuned, plain = (fill(with_expert_lora(model)) for model in models[:2])
    for model in (tuned, plain):
        hf_moe.accelerate_adapters(model)
    torch.testing.assert_close(tuned(**models[2]).logits, plain(**models[2]).logits)
    with pytest.raises(MergeError, match="stored as Int8Values cannot be merged into"):
        merge_and_check(tuned, **models[2])
    torch.testing.assert_close(tuned(**models[2]).logits, plain(**models[2]).logits)


def test_torchao(models):
    quantization = pytest.importorskip("torchao.quantization")
    model, inputs = build_tiny("mixtral", hidden_size=64, intermediate_size=64)
    expected = model(**inputs).logits
    experts = [layer.experts_name for layer in hf_moe.moe_layers(model)]
    names = [f"{name}.{projection}" for name in experts for projection in ("gate_up_proj", "down_proj")]
    config = quantization.FqnToConfig(dict.fromkeys(names, quantization.Int8WeightOnlyConfig()))
    quantization.quantize_(model, config, filter_fn=None)
    model.set_experts_implementation("hf_moe")
    assert "hf_moe runs hf_moe_grouped: hf_moe_cpu has no operators for weights stored as Int8Tensor" in str(
        hf_moe.explain(model)
    )
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0.05)
