"""What `hf_moe` chooses, by device, dtype, rows and what is installed; and what a failing compiler leads to."""

import importlib

import pytest
import torch

import hf_moe
from hf_moe.experts import engines
from hf_moe.experts.engines import choose, triton_refuses
from hf_moe.experts.host import HOST_REFUSALS
from tiny_models import build_tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def experts():
    model, _ = build_tiny("mixtral")
    return model.model.layers[0].mlp.experts


@pytest.fixture
def gpu(monkeypatch):
    """Pretend that the machine has a GPU of a compute capability, and Triton."""

    def pretend(capability):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: name)

    return pretend


@pytest.mark.parametrize(
    ("capability", "many_rows", "expected"),
    [
        ((7, 5), False, "hf_moe_grouped"),
        ((8, 0), False, "hf_moe_triton"),
        ((8, 0), True, "hf_moe_triton"),
        ((9, 0), False, "hf_moe_triton"),
        ((9, 0), True, "hf_moe_grouped"),
        ((10, 0), True, "hf_moe_grouped"),
        ((12, 0), True, "hf_moe_triton"),
    ],
)
def test_choice_on_a_gpu(experts, gpu, capability, many_rows, expected):
    gpu(capability)
    choice = choose(experts, torch.bfloat16, CUDA, many_rows)
    assert choice.name == expected
    assert choice.is_second_best == (capability == (7, 5))


def test_choice_without_triton_or_in_float64(experts, gpu, monkeypatch):
    gpu((9, 0))
    double = choose(experts, torch.float64, CUDA)
    assert double == ("hf_moe_grouped", triton_refuses(experts, torch.float64, CUDA), True)
    monkeypatch.setattr(engines.importlib.util, "find_spec", lambda name: None)
    choice = choose(experts, torch.bfloat16, CUDA)
    assert choice.name == "hf_moe_grouped"
    assert 'pip install "hf-moe[triton]"' in str(choice)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_choice_on_the_cpu(experts, dtype, monkeypatch):
    monkeypatch.setattr(importlib.import_module("hf_moe.kernels.cpu.build"), "unavailable_reason", lambda: None)
    assert choose(experts, dtype, CPU).name == "hf_moe_cpu"


def test_a_kernel_of_the_host_is_used_only_where_the_user_allows_it(experts, gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setitem(HOST_REFUSALS, "sonicmoe", lambda *_: None)
    assert choose(experts, torch.bfloat16, CUDA).name == "hf_moe_triton"
    monkeypatch.setenv("HF_MOE_DELEGATE", "deepgemm, sonicmoe")
    monkeypatch.setitem(HOST_REFUSALS, "deepgemm", lambda *_: "no")
    assert choose(experts, torch.bfloat16, CUDA).name == "sonicmoe"
    monkeypatch.setenv("HF_MOE_DELEGATE", "sonic")
    with pytest.raises(ValueError, match=r"HF_MOE_DELEGATE may hold 'sonicmoe' and 'deepgemm'.*got 'sonic'"):
        choose(experts, torch.bfloat16, CUDA)


def test_delegation_calls_the_hosts_function(experts, monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    called = []
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "sonicmoe", lambda *arguments: called.append(arguments))
    monkeypatch.setattr(engines, "choose", lambda *_: engines.Choice("sonicmoe", "a test"))
    call = (torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    engines.forward_of("hf_moe")(experts, *call)
    assert called == [(experts, *call)]


@pytest.fixture
def no_engine_yet(monkeypatch):
    monkeypatch.setattr(engines, "ENGINES", {"hf_moe_grouped": engines.ENGINES["hf_moe_grouped"]})
    monkeypatch.setattr(engines, "_BROKEN", {})
    engines._say.cache_clear()


def test_a_compiler_that_fails_leads_to_the_next_best_which_is_said(no_engine_yet, monkeypatch, caplog):
    build = importlib.import_module("hf_moe.kernels.cpu.build")

    def fail():
        raise RuntimeError("building failed: cc1plus: out of memory")

    monkeypatch.setattr(build, "unavailable_reason", lambda: None)
    monkeypatch.setattr(build, "load_kernels", fail)
    model, inputs = build_tiny("mixtral")
    model.set_experts_implementation("hf_moe")
    out = model(**inputs).logits
    said = "hf_moe runs hf_moe_grouped: building failed: cc1plus: out of memory."
    assert caplog.text.count(said) == 1
    assert said in str(hf_moe.explain(model))
    model.set_experts_implementation("eager")
    torch.testing.assert_close(out, model(**inputs).logits)


@pytest.mark.parametrize("known", [False, True])
def test_kernels_asked_for_by_name_that_cannot_be_built_are_an_error(experts, no_engine_yet, monkeypatch, known):
    """Whether this is the first that is heard of it or not."""
    build = importlib.import_module("hf_moe.kernels.cpu.build")

    def fail():
        raise RuntimeError("no folder can be written: name one with HF_MOE_CPU_CACHE")

    monkeypatch.setattr(build, "unavailable_reason", lambda: None)
    monkeypatch.setattr(build, "load_kernels", fail)
    call = (torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    experts.config._experts_implementation = "hf_moe"
    if known:
        experts(*call)
    experts.config._experts_implementation = "hf_moe_cpu"
    with pytest.raises(ValueError, match=r"'hf_moe_cpu' cannot run MixtralExperts: no folder can be written: name"):
        experts(*call)
