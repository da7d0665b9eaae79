"""The refusals are true: what is refused raises in transformers, what is not refused runs."""

import pytest
import torch

from hf_moe.experts.backends import BACKENDS, available_backends, refusal, refusals
from hf_moe.experts.contract import has_custom_gate
from hf_moe.experts.grouped import has_grouped_mm
from hf_moe.experts.request import Backend, request_for
from hf_moe.layers.storage import storage_of
from tiny_models import FAMILIES, build_tiny, experts_class

CPU = torch.device("cpu")
SIZES = {
    "aligned": ("mixtral", {}),
    "odd_width": ("mixtral", {"intermediate_size": 23}),
    "aligned_in_float32_only": ("mixtral", {"intermediate_size": 20}),
    "odd_hidden_size": ("mixtral", {"hidden_size": 34, "head_dim": 8}),
    "transposed": ("gpt_oss", {}),
    "transposed_odd_width": ("gpt_oss", {"intermediate_size": 23}),
    "ungated": ("nemotron_h", {}),
    "ungated_odd_width": ("nemotron_h", {"moe_intermediate_size": 23}),
}


def request(experts):
    return request_for(experts, storage_of(experts), CPU)


def run(model, inputs):
    model(**inputs)[0].float().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", SIZES)
def test_refusals_are_true_on_the_cpu(case, dtype):
    family, overrides = SIZES[case]
    model, inputs = build_tiny(family, **overrides)
    model.to(dtype)
    experts = next(module for module in model.modules() if type(module) is experts_class(family))
    refused = refusals(request(experts))
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        if name in refused:
            with pytest.raises(RuntimeError, match=r"Expected mat_a to be Float32|multiple of 16 bytes"):
                run(model, inputs)
        else:
            run(model, inputs)


def test_reasons_name_value_rule_and_way_out():
    model, _ = build_tiny("mixtral", intermediate_size=23)
    experts = model.model.layers[0].mlp.experts
    assert storage_of(experts).shape("down") == (32, 23)
    reason = refusals(request(experts.bfloat16()))["grouped_mm"]
    assert "23 torch.bfloat16 values are 46 bytes" in reason
    assert "multiple of 8" in reason
    assert "on cpu" in refusals(request(experts))["deepgemm"]
    assert "float64" in refusals(request(experts.double()))["grouped_mm"]


def test_experts_of_unknown_widths_have_no_grouped_product(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert has_grouped_mm((32, 24), torch.bfloat16, torch.device("cuda", 0))
    assert not has_grouped_mm((), torch.bfloat16, torch.device("cuda", 0))


def test_the_table_covers_transformers_registry():
    assert set(available_backends()) == set(BACKENDS)


def test_sonicmoe_refuses_gates_that_it_would_ignore():
    custom = set()
    for family in FAMILIES:
        if has_custom_gate(_on_meta(family)):
            custom.add(family)
    assert {"gpt_oss", "deepseek_v4"} <= custom
    assert not custom & {"mixtral", "olmoe", "qwen3_moe"}
    reason = refusals(request(_on_meta("gpt_oss")))["sonicmoe"]
    assert "ignores the gate that GptOssExperts defines" in reason


def _on_meta(family):
    with torch.device("meta"):
        model, _ = build_tiny(family)
    return next(module for module in model.modules() if type(module) is experts_class(family))


def test_a_backend_accepts_by_default():
    assert refusal(Backend("mine"), request(_on_meta("mixtral"))) is None
