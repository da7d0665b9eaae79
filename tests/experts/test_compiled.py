"""One graph for all lengths: `torch.compile`, `torch.export` and ONNX of experts on our implementations."""

import pytest
import torch
from torch._dynamo.utils import counters

from hf_moe.experts import backends, own_backends
from hf_moe.experts.request import Request
from hf_moe.kernels.cpu import unavailable_reason
from tiny_lora import accelerated, adapted, build

NAMES = ("hf_moe", "hf_moe_cpu", "hf_moe_grouped")
EXPERTS, HIDDEN = 8, 32


@pytest.fixture
def experts_on():
    """Experts of a tiny Mixtral, with or without an accelerated adapter, on one of our implementations."""

    def make(name, lora=False):
        if name == "hf_moe_cpu" and (reason := unavailable_reason()):
            pytest.skip(reason)
        model = build("mixtral", torch.float32)[0]
        model = accelerated(adapted(model), name).get_base_model() if lora else model
        model.set_experts_implementation(name)
        return model.model.layers[0].mlp.experts

    torch.compiler.reset()
    counters.clear()
    yield make
    torch.compiler.reset()


def call(tokens):
    index = torch.arange(2 * tokens).view(tokens, 2) % EXPERTS
    return torch.randn(tokens, HIDDEN, requires_grad=True), index, torch.rand(tokens, 2, requires_grad=True)


def outcome(function, arguments):
    """Output and gradients."""
    out = function(*arguments)
    return [out, *torch.autograd.grad(out.square().sum(), (arguments[0], arguments[2]))]


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize(("dynamic", "graphs"), [(True, 1), (None, 2)])  # unasked, torch makes the first one static
@pytest.mark.parametrize("name", NAMES)
def test_compiles_once_for_all_lengths(experts_on, name, dynamic, graphs, lora):
    experts = experts_on(name, lora)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (5, 7, 12, 64):
        arguments = call(tokens)
        for actual, expected in zip(outcome(compiled, arguments), outcome(experts, arguments), strict=True):
            torch.testing.assert_close(actual, expected)
    assert counters["stats"]["unique_graphs"] == graphs


def test_where_the_rows_decide_there_is_a_graph_for_few_and_one_for_many(experts_on, monkeypatch):
    asked = []
    experts_on("hf_moe_grouped")(*call(5))  # loads it

    @torch.compiler.assume_constant_result
    def resolve(name, *request):
        asked.append(Request(*request).many_rows)
        return "hf_moe_grouped"

    monkeypatch.setattr(own_backends, "many_rows_from", lambda dtype, device, adapted: 3)
    monkeypatch.setattr(backends, "resolve", resolve)
    compiled = torch.compile(experts_on("hf_moe"), fullgraph=True, backend="eager", dynamic=True)
    for tokens in (5, 11, 12, 64, 6):  # 2 slots of 12 tokens: 3 rows for each of 8 experts
        compiled(*call(tokens))
    assert asked == [False, True]
    assert counters["stats"]["unique_graphs"] == 2


def exported(experts, strict):
    tokens = {0: torch.export.Dim("tokens", min=2, max=64)}
    # PEFT's wrapper takes the rows and *args
    shapes = (tokens, (tokens, tokens)) if hasattr(experts, "base_layer") else (tokens, tokens, tokens)
    with torch.no_grad():
        return torch.export.export(experts, call(6), dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_exports_with_a_length_that_is_left_open(experts_on, name, strict, lora):
    experts = experts_on(name, lora)
    arguments = call(9)
    torch.testing.assert_close(exported(experts, strict).module()(*arguments), experts(*arguments))


def test_onnx_gets_an_implementation_that_it_knows_or_a_sentence(experts_on, monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    program = exported(experts_on("hf_moe"), strict=False)
    assert not [node for node in program.graph.nodes if "hf_moe" in str(node.target)]
    for name in ("hf_moe_grouped", "hf_moe_triton"):
        with pytest.raises(ValueError, match=rf"'{name}' cannot be exported .*implementation\('batched_mm'"):
            exported(experts_on(name), strict=False)
    with pytest.raises(ValueError, match=r"'batched_mm'\) before torch.onnx.export. Merge the adapters before"):
        exported(experts_on("hf_moe", lora=True), strict=False)


def test_onnx_computes_the_same(experts_on):
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    experts, tokens = experts_on("hf_moe"), torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        program = torch.onnx.export(experts, call(6), dynamo=True, dynamic_shapes=({0: tokens},) * 3, verbose=False)
        arguments = call(9)
        values = [value.numpy() for value in arguments]
        names = [value.name for value in program.model_proto.graph.input]
        (out,) = ReferenceEvaluator(program.model_proto).run(None, dict(zip(names, values, strict=True)))
        torch.testing.assert_close(torch.from_numpy(out), experts(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
def test_a_whole_model_compiles_once_for_all_lengths(experts_on, lora):
    model = build("qwen3_moe", torch.float32)[0].eval()
    model = accelerated(adapted(model)).get_base_model() if lora else model
    model.set_experts_implementation("hf_moe")
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for length in (5, 9, 17):
        ids = torch.arange(3, 3 + 2 * length).view(2, length)
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    assert counters["stats"]["unique_graphs"] == 1
