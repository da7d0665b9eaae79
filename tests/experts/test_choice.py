"""What `hf_moe` chooses, by device, dtype, rows and what is installed; and what a failing compiler leads to."""

import importlib
import importlib.util
import json

import pytest
import torch

import hf_moe
from hf_moe.experts import backends, crossover
from hf_moe.experts.backends import BACKENDS, choose, refusal
from hf_moe.experts.own_backends import has_many_rows
from hf_moe.experts.request import Backend, Request, request_for
from hf_moe.io.installation import install_command
from hf_moe.layers.storage import storage_of
from tiny_models import build_tiny

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def request(experts, dtype, device, **facts) -> Request:
    return request_for(experts.to(dtype), storage_of(experts), device, **facts)


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
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)

    return pretend


BF16, MIXTRAL_ROWS = torch.bfloat16, 2048 * 8  # rows of 8192 tokens


@pytest.mark.parametrize(
    ("capability", "dtype", "rows", "expected"),
    [
        ((7, 5), BF16, 2, "hf_moe_grouped"),
        ((8, 0), BF16, 2, "hf_moe_triton"),
        ((8, 0), BF16, MIXTRAL_ROWS, "hf_moe_triton"),
        ((8, 0), torch.float16, MIXTRAL_ROWS, "hf_moe_triton"),
        ((9, 0), BF16, 2, "hf_moe_triton"),
        ((9, 0), BF16, MIXTRAL_ROWS, "hf_moe_grouped"),
        ((9, 0), torch.float16, MIXTRAL_ROWS, "hf_moe_triton"),
        ((9, 0), torch.float32, MIXTRAL_ROWS, "hf_moe_triton"),
        ((10, 0), BF16, MIXTRAL_ROWS, "hf_moe_grouped"),
        ((12, 0), BF16, MIXTRAL_ROWS, "hf_moe_triton"),
    ],
)
@pytest.mark.parametrize("adapted", [False, True])
def test_choice_on_a_gpu(experts, gpu, capability, dtype, rows, expected, adapted):
    """Many rows lead to torch's product where it is one kernel, and never under an adapter."""
    gpu(capability)
    many_rows = has_many_rows(rows, 8, dtype, CUDA, adapted)
    choice = choose(request(experts, dtype, CUDA, many_rows=many_rows, adapted=adapted))
    assert choice.name == ("hf_moe_triton" if adapted and capability >= (8, 0) else expected)
    assert choice.is_second_best == (capability == (7, 5))
    forced = choose(request(experts, dtype, CUDA, many_rows=True, adapted=adapted))
    assert forced.name == choice.name or rows == 2


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_torch_s_product_by_name_is_the_hybrid_in_every_dtype(experts, gpu, dtype, monkeypatch):
    gpu((9, 0))
    monkeypatch.setattr(backends, "OPERATORS", {"hybrid": None})
    assert backends.resolve("hf_moe_grouped", *request(experts, dtype, CUDA)) == "hybrid"


def test_the_choice_says_that_its_threshold_is_assumed(experts, gpu, monkeypatch, tmp_path):
    gpu((9, 0))
    many = request(experts, BF16, CUDA, many_rows=True)
    assert "1024 rows an expert (assumed, not measured)" in choose(many).reason
    entry = {"rows_per_expert": 300, "status": "measured", "source": "experts_h200.json", "date": "2026-12-24"}
    monkeypatch.setattr(crossover, "TABLE", tmp_path / "crossover.json")
    crossover.TABLE.write_text(json.dumps({"sm_90": entry}))
    assert "300 rows an expert (measured on 2026-12-24)" in choose(many).reason
    assert [has_many_rows(rows, 8, BF16, CUDA) for rows in (2399, 2400)] == [False, True]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"rows_per_expert": 0}, "rows_per_expert must be a positive integer, got 0"),
        ({"rows_per_expert": "1024"}, "rows_per_expert must be a positive integer, got '1024'"),
        ({"status": "known"}, "status must be one of assumed, measured, got 'known'"),
        ({"source": ""}, "source must say where the number is from, got ''"),
        ({"date": "24.12.2026"}, "date must be of the form 2026-11-30, got '24.12.2026'"),
        ({"rows": 3}, r"an entry has \['date', 'rows_per_expert', 'source', 'status'\]"),
    ],
)
def test_a_malformed_threshold_is_refused_with_its_file(change, rule, tmp_path):
    path = tmp_path / "crossover.json"
    path.write_text(json.dumps({"sm_90": json.loads(crossover.TABLE.read_text())["sm_90"] | change}))
    with pytest.raises(ValueError, match=f"{path}: sm_90: {rule}"):
        crossover.read_crossovers(path)


def test_choice_without_triton_or_in_float64(experts, gpu, monkeypatch):
    gpu((9, 0))
    double = choose(request(experts, torch.float64, CUDA))
    assert double == (
        "hf_moe_grouped",
        refusal(BACKENDS["hf_moe_triton"], request(experts, torch.float64, CUDA)),
        True,
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    choice = choose(request(experts, torch.bfloat16, CUDA))
    assert choice.name == "hf_moe_grouped"
    assert install_command("triton") in str(choice)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_choice_on_the_cpu(experts, dtype, monkeypatch):
    monkeypatch.setattr(importlib.import_module("hf_moe.kernels.cpu.build"), "unavailable_reason", lambda: None)
    assert choose(request(experts, dtype, CPU)).name == "hf_moe_cpu"


def test_a_kernel_of_transformers_is_used_only_where_the_user_allows_it(experts, gpu, monkeypatch):
    gpu((9, 0))
    monkeypatch.setitem(BACKENDS, "sonicmoe", Backend("sonicmoe"))
    assert choose(request(experts, torch.bfloat16, CUDA)).name == "hf_moe_triton"
    monkeypatch.setenv("HF_MOE_DELEGATE", "deepgemm, sonicmoe")
    monkeypatch.setitem(BACKENDS, "deepgemm", Backend("deepgemm", lambda request: "no"))
    assert choose(request(experts, torch.bfloat16, CUDA)).name == "sonicmoe"
    monkeypatch.setenv("HF_MOE_DELEGATE", "sonic")
    with pytest.raises(ValueError, match=r"HF_MOE_DELEGATE may hold 'sonicmoe' and 'deepgemm'.*got 'sonic'"):
        choose(request(experts, torch.bfloat16, CUDA))


def test_delegation_calls_transformers_function(experts, monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    called = []
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._local_mapping, "sonicmoe", lambda *arguments: called.append(arguments))
    chosen = (BACKENDS["sonicmoe"], backends.Choice("sonicmoe", "a test"))
    monkeypatch.setattr(backends, "_chosen", lambda request: chosen)
    call = (torch.randn(3, 32), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    backends.forward_of("hf_moe")(experts, *call)
    assert called == [(experts, *call)]


@pytest.fixture
def nothing_loaded_yet(monkeypatch):
    monkeypatch.setattr(backends, "OPERATORS", {})
    monkeypatch.setattr(backends, "_BROKEN", {})
    backends._log_choice.cache_clear()


def test_a_compiler_that_fails_leads_to_the_next_best_which_is_logged(nothing_loaded_yet, monkeypatch, caplog):
    build = importlib.import_module("hf_moe.kernels.cpu.build")

    def fail():
        raise RuntimeError("building failed: cc1plus: out of memory")

    monkeypatch.setattr(build, "unavailable_reason", lambda: None)
    monkeypatch.setattr(build, "load_kernels", fail)
    model, inputs = build_tiny("mixtral")
    model.set_experts_implementation("hf_moe")
    out = model(**inputs).logits
    sentence = "hf_moe runs hf_moe_grouped: building failed: cc1plus: out of memory."
    assert caplog.text.count(sentence) == 1
    assert sentence in str(hf_moe.explain(model))
    model.set_experts_implementation("eager")
    torch.testing.assert_close(out, model(**inputs).logits)


@pytest.mark.parametrize("known", [False, True])
def test_kernels_asked_for_by_name_that_cannot_be_built_are_an_error(experts, nothing_loaded_yet, monkeypatch, known):
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
