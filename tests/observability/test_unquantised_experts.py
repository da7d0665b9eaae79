"""A model that counts as quantised while its experts are not: reported, with bytes."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from hf_moe.layers.moe_layers import moe_layers
from hf_moe.observability.explain import explain, explain_config
from hf_moe.observability.unquantised_experts import LINEAR_ONLY, stored_bytes
from tiny_models import build_tiny, tiny_config


class Packed(nn.Module):
    """Stands for the linear layer of a quantiser: eight-bit values and a scale for each row."""

    def __init__(self, linear, *, as_buffer):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        packed = (weight / scale).round().to(torch.int8)
        if as_buffer:
            self.register_buffer("qweight", packed)
        else:
            self.weight = nn.Parameter(packed, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x):
        return x @ (dict(self.named_buffers()).get("qweight", getattr(self, "weight", None)) * self.scale).T


def pack_linears(model, *, as_buffer=False):
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head":
                setattr(module, name, Packed(child, as_buffer=as_buffer))


def bytes_of_experts(model):
    return sum(p.numel() * p.element_size() for layer in moe_layers(model) for p in layer.experts.parameters())


@pytest.mark.parametrize(
    ("as_buffer", "config", "who"),
    [
        (False, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        (True, {"quant_method": "gptq", "bits": 4}, "gptq"),
        (False, None, "A quantiser"),  # applied by hand: the config does not know
    ],
)
def test_a_loaded_model(as_buffer, config, who):
    model, inputs = build_tiny("qwen3_moe")
    pack_linears(model, as_buffer=as_buffer)
    if config is not None:
        model.config.quantization_config = config
    model(**inputs)
    (warning,) = explain(model).warnings
    experts = bytes_of_experts(model)
    weights = [*model.parameters(), *(b for b in model.buffers() if b.dtype == torch.int8)]
    total = sum(w.numel() * w.element_size() for w in weights)
    packed = [w for w in weights if w.dtype == torch.int8]
    assert warning == (
        f"{who} left the experts as they were, in float32: {experts:,} of {total:,} bytes ({experts / total:.0%}); "
        f"quantised are {len(packed)} other tensors, {sum(w.numel() for w in packed):,} bytes."
    )


def test_what_is_not_quantised_is_not_called_so():
    model, _ = build_tiny("deepseek_v4")  # it holds integers: a table of experts by token
    assert explain(model).warnings == ()


def test_packed_experts_are_not_called_unquantised():
    model, _ = build_tiny("qwen3_moe")
    for layer in moe_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            packed = getattr(layer.experts, name).detach().to(torch.int8)
            setattr(layer.experts, name, nn.Parameter(packed, requires_grad=False))
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    assert not any("left the experts" in warning for warning in explain(model).warnings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes, which quantises linear layers alone"),
        ({"quant_method": "awq", "bits": 4}, "awq, which quantises linear layers alone"),
        ({"quant_method": "torchao", "quant_type": {"default": "int8"}}, "torchao, which quantises linear layers"),
        ({"quant_method": "torchao", "quant_type": {"default": {"_type": "FqnToConfig"}}}, "whether that reaches"),
        ({"quant_method": "compressed-tensors"}, "whether that reaches the experts"),
        ({"quant_method": "mxfp4"}, None),
    ],
)
def test_a_config_alone_says_what_will_happen(settings, expected):
    config = tiny_config("qwen3_moe", dtype="bfloat16")
    config.quantization_config = settings
    explained = explain_config(config)
    if expected is None:
        assert explained.warnings == ()
        return
    (warning,) = explained.warnings
    assert expected in warning
    model, _ = build_tiny("qwen3_moe")
    assert f"{bytes_of_experts(model) // 2:,} bytes" in warning
    assert "bfloat16" in warning


@pytest.mark.parametrize("method", LINEAR_ONLY)
def test_the_quantisers_named_know_no_experts(method):
    """Red if transformers teaches one of them: its row then goes."""
    root = Path(transformers.__file__).parent
    names = {"bitsandbytes": "bnb_4bit"}
    files = [root / "quantizers" / f"quantizer_{names.get(method, method)}.py", root / "integrations" / f"{method}.py"]
    if not files[0].exists():
        pytest.skip(f"transformers {transformers.__version__} has no {method}")
    for file in files:
        if file.exists():
            assert not re.search("Experts(?!Interface)", file.read_text())


def test_bytes_of_a_tensor_subclass():
    quanto = pytest.importorskip("optimum.quanto")
    model, _ = build_tiny("qwen3_moe")
    before = sum(map(stored_bytes, model.parameters()))
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    assert sum(map(stored_bytes, model.parameters())) < before
    assert "A quantiser left the experts as they were, in float32" in explain(model).warnings[0]


def test_bitsandbytes(tmp_path, caplog):
    pytest.importorskip("bitsandbytes")
    from hf_moe.finetuning.arguments import ModelArguments
    from hf_moe.finetuning.prepare import load_model

    model, _ = build_tiny("qwen3_moe")
    model.save_pretrained(tmp_path)
    settings = transformers.BitsAndBytesConfig(load_in_8bit=True)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=settings, device_map="cpu")
    assert "bitsandbytes left the experts as they were" in explain(loaded).warnings[0]
    loaded.save_pretrained(tmp_path / "quantised")
    with caplog.at_level("WARNING"):
        load_model(ModelArguments(model=str(tmp_path / "quantised")), torch.device("cpu"))
    assert "bitsandbytes left the experts as they were" in caplog.text


def test_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model, _ = build_tiny("qwen3_moe")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert "A quantiser left the experts as they were, in float32" in explain(model).warnings[0]
