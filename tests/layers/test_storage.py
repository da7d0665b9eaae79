"""What stores a module's own weights: dense tensors, or a parametrisation, of which no more is unpacked than used."""

import copy

import pytest
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.utils import parametrize

import hf_moe
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.layers.packed_storages import ParametrizedStorage, UnreadableStorage
from hf_moe.layers.storage import DenseStorage, Plan, storage_of
from storages import assert_compiles
from tiny_lora import accelerated, adapted, assert_equal, build, outputs, results
from tiny_models import build_tiny
from tiny_moe import qwen_model, with_expert_lora

NAMES = ("gate_up_proj", "down_proj")
EXPERTS = 8


class Counting(nn.Module):
    """Notes how many experts it unpacks."""

    def __init__(self):
        super().__init__()
        self.unpacked = []


class RowScales(Counting):
    """int8, a scale for every row: computed by expert once its buffer is sliced as well."""

    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, values):
        self.unpacked.append(len(values))
        return values.to(self.scale.dtype) * self.scale

    @classmethod
    def pack(cls, weight):
        scale = weight.abs().amax(-1, keepdim=True) / 127
        return (weight / scale).round().to(torch.int8), cls(scale)


class Centered(Counting):
    """Of the whole stack: no expert can be had singly."""

    def forward(self, values):
        self.unpacked.append(len(values))
        return values - values.mean()

    @classmethod
    def pack(cls, weight):
        return weight, cls()


def packed(model, form):
    """Two copies of a model: one with parametrised experts, one with the same weights in plain tensors."""
    stored, dense = copy.deepcopy(model), copy.deepcopy(model)
    for layer, plain in zip(moe_layers(stored), moe_layers(dense), strict=True):
        for name in NAMES:
            values, parametrization = form.pack(getattr(layer.experts, name).detach())
            setattr(layer.experts, name, nn.Parameter(values, requires_grad=False))
            parametrize.register_parametrization(layer.experts, name, parametrization, unsafe=True)
            setattr(plain.experts, name, nn.Parameter(getattr(layer.experts, name).detach(), requires_grad=False))
    return stored, dense


def unpacked(model):
    """Experts that the parametrisations unpacked since the last call."""
    counts = [module.unpacked for module in model.modules() if isinstance(module, Counting)]
    total = sum(map(sum, counts))
    for count in counts:
        count.clear()
    return total


def few_tokens(inputs):
    return {name: value[:1, :3] for name, value in inputs.items()}


@pytest.mark.parametrize("implementation", ["hf_moe", "hf_moe_grouped", "hf_moe_reference"])
@pytest.mark.parametrize("form", [RowScales, Centered])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_parametrised_experts_equal_dense_ones(family, form, implementation):
    model, inputs = build(family)
    found = []
    for each in packed(model, form):
        each.set_experts_implementation(implementation)
        each.requires_grad_(False).get_input_embeddings().requires_grad_(True)
        found.append(results(each, inputs))
    assert_equal(*found)


def factors(model):
    """PEFT's parameters by layer, projection and name: with parametrised weights PEFT nests its wrappers otherwise."""
    numbers = {id(layer.experts): number for number, layer in enumerate(moe_layers(model))}
    return {
        (numbers[id(wrapper.get_base_layer())], wrapper.parameter_name, name): parameter
        for wrapper in model.modules()
        if isinstance(wrapper, ParamWrapper)
        for name, parameter in (*wrapper.lora_A.named_parameters(), *wrapper.lora_B.named_parameters(prefix="B"))
    }


@pytest.mark.parametrize("form", [RowScales, Centered])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_lora_over_parametrised_experts_equals_lora_over_dense_ones(family, form):
    model, inputs = build(family)
    stored, dense = (accelerated(adapted(each)) for each in packed(model, form))
    with torch.no_grad():
        for key, parameter in factors(dense).items():
            parameter.copy_(factors(stored)[key])
    found = [results(each, inputs) for each in (stored, dense)]
    torch.testing.assert_close(found[0]["out"], found[1]["out"], rtol=1e-10, atol=1e-12)
    for key, parameter in factors(dense).items():
        torch.testing.assert_close(factors(stored)[key].grad, parameter.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", ["hf_moe", "hf_moe_grouped"])
def test_only_experts_with_rows_are_unpacked(implementation):
    model, inputs = build("mixtral", torch.float32)
    stored, _ = packed(model, RowScales)
    stored.set_experts_implementation(implementation)
    outputs(stored, inputs)  # how the stack is computed is found once
    few, layers = few_tokens(inputs), len(moe_layers(stored))
    unpacked(stored)
    out = outputs(stored, few)
    forward = unpacked(stored)
    assert 0 < forward <= layers * 2 * 3 * 2  # 3 tokens with 2 experts each
    out.sum().backward()
    assert 0 < unpacked(stored) <= forward


def test_what_can_only_be_had_whole_is_computed_once_a_projection():
    model, inputs = build("mixtral", torch.float32)
    stored, _ = packed(model, Centered)
    stored.set_experts_implementation("hf_moe")
    outputs(stored, inputs)
    unpacked(stored)
    whole = len(moe_layers(stored)) * 2 * EXPERTS
    out = outputs(stored, inputs)
    assert unpacked(stored) == whole
    out.sum().backward()
    assert unpacked(stored) == whole


def test_a_trained_parametrisation_gets_its_gradient():
    model, inputs = build("mixtral")
    stored, _ = packed(model, RowScales)
    for module in list(stored.modules()):
        if isinstance(module, RowScales):
            scale = module._buffers.pop("scale")
            module.scale = nn.Parameter(scale)
    gradients = []
    for implementation in ("eager", "hf_moe"):
        each = copy.deepcopy(stored)
        each.set_experts_implementation(implementation)
        gradients.append(results(each, inputs))
    assert any("scale" in name for name in gradients[0])
    assert_equal(gradients[1], gradients[0])


class Shifted(Counting):
    """Of the whole stack, as one sees only once `share` is no longer zero."""

    def __init__(self):
        super().__init__()
        self.register_buffer("share", torch.zeros(()))

    def forward(self, values):
        return values + self.share * values.mean()

    @classmethod
    def pack(cls, weight):
        return weight, cls()


@pytest.mark.parametrize("form", [Shifted, RowScales])
def test_what_a_parametrisation_is_made_of_may_change_between_calls(form):
    model, inputs = build("mixtral")
    stored, _ = packed(model, form)
    found = []
    for implementation in ("eager", "hf_moe"):
        each = copy.deepcopy(stored)
        each.set_experts_implementation(implementation)
        outputs(each, inputs)
        for buffer in (b for module in each.modules() if isinstance(module, form) for b in module.buffers()):
            buffer.add_(0.5)
        found.append(outputs(each, inputs))
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_a_cast_of_scales_alone_is_seen():
    model, inputs = build("mixtral")
    stored, dense = (each for each in packed(model, RowScales))
    for each in (stored, dense):
        each.set_experts_implementation("hf_moe_grouped")
        outputs(each, inputs)
        each.to(torch.float32)  # int8 stays
    assert storage_of(moe_layers(stored)[0].experts).dtype is torch.float32
    torch.testing.assert_close(outputs(stored, inputs), outputs(dense, inputs), rtol=1e-4, atol=1e-5)


class Dropout(nn.Module):
    def forward(self, values):
        return nn.functional.dropout(values, 0.5, self.training)


def _spectral_norm(weight):
    return nn.utils.parametrizations._SpectralNorm(weight)


@pytest.mark.parametrize("make", [lambda weight: Dropout(), _spectral_norm], ids=["dropout", "spectral norm"])
def test_one_that_gives_another_stack_each_time_is_differentiated_as_it_was(make):
    model, _ = build("mixtral")
    model.set_experts_implementation("hf_moe")
    experts = moe_layers(model)[0].experts.requires_grad_(False).train()
    parametrization = make(experts.down_proj.detach())
    parametrize.register_parametrization(experts, "down_proj", parametrization)
    experts.parametrizations.requires_grad_(False)
    before = {name: buffer.clone() for name, buffer in parametrization.named_buffers()}
    hidden, index, weights = torch.randn(5, 32).double(), torch.arange(10).view(5, 2) % EXPERTS, torch.rand(5, 2)

    def loss(hidden):
        torch.manual_seed(0)
        for name, buffer in before.items():
            setattr(parametrization, name, buffer.clone())
        return experts(hidden, index, weights).square().sum()

    loss(hidden)
    assert torch.autograd.gradcheck(loss, hidden.requires_grad_(), fast_mode=True)


def test_peft_adds_to_parametrised_experts_with_gradients():
    """Not accelerated, PEFT parametrises the same parameter once more for a forward."""
    model, inputs = build("mixtral")
    stored, _ = packed(model, RowScales)
    tuned = adapted(stored, attention=True)
    found = []
    for implementation in ("batched_mm", "hf_moe_grouped"):
        each = copy.deepcopy(tuned)
        each.get_base_model().set_experts_implementation(implementation)
        out = outputs(each, inputs)
        out.square().sum().backward()
        gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        assert any("experts" in name for name in gradients)
        found.append({"out": out.detach(), **gradients})
    assert_equal(found[1], found[0], 1e-10)


def test_a_trained_parametrisation_is_computed_once_a_step():
    model, inputs = build("mixtral")
    stored, _ = packed(model, RowScales)
    stored.set_experts_implementation("hf_moe")
    for module in list(stored.modules()):
        if isinstance(module, RowScales):
            module.scale = nn.Parameter(module._buffers.pop("scale"))
    optimizer = torch.optim.SGD(stored.parameters(), 1e-3)
    for step in range(3):
        unpacked(stored)
        outputs(stored, inputs).sum().backward()
        optimizer.step()
        assert step == 0 or unpacked(stored) == len(moe_layers(stored)) * 2 * EXPERTS


@pytest.mark.parametrize("lora", [pytest.param(False, marks=pytest.mark.long), True], ids=["plain", "lora"])
@pytest.mark.parametrize("form", [RowScales, Centered])
def test_parametrised_experts_under_torch_compile(form, lora):
    stored, _ = packed(build("mixtral", torch.float32)[0], form)
    stored = accelerated(adapted(stored)).get_base_model() if lora else stored
    stored.set_experts_implementation("hf_moe")
    assert_compiles(stored.model.layers[0].mlp.experts)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("hidden", [64, 256])
def test_bitsandbytes(compressed, hidden, monkeypatch):
    """Its scales are in blocks; those of an expert are sliced where they are whole blocks, else the stack is read."""
    bnb = pytest.importorskip("bitsandbytes.nn.parametrize")
    sizes_of = {"hidden_size": hidden, "intermediate_size": 128}
    (model, inputs), (dense, _) = build_tiny("mixtral", **sizes_of), build_tiny("mixtral", **sizes_of)
    for layer, plain in zip(moe_layers(model), moe_layers(dense), strict=True):
        for name in NAMES:
            bnb.replace_parameter_4bit(layer.experts, name, compress_statistics=compressed)
            setattr(plain.experts, name, nn.Parameter(getattr(layer.experts, name), requires_grad=False))
    sizes = []
    dequantize = bnb.F.dequantize_4bit

    def counting(values, state):
        sizes.append(state.shape[0])
        return dequantize(values, state)

    expected = outputs(dense, inputs)
    model.set_experts_implementation("hf_moe")
    monkeypatch.setattr(bnb.F, "dequantize_4bit", counting)
    torch.testing.assert_close(outputs(model, inputs), expected)
    assert storage_of(moe_layers(model)[0].experts).format == "Bnb4bitParametrization"
    sizes.clear()
    outputs(model, few_tokens(inputs))
    # 64 values a block, and 256 blocks a block of their scales
    assert set(sizes) == ({1, EXPERTS} if compressed and hidden == 64 else {1})


def test_the_modules_own_tensors_are_dense_and_read_anew_in_every_call():
    model = qwen_model()
    experts = moe_layers(model)[0].experts
    storage = storage_of(experts)
    assert isinstance(storage, DenseStorage)
    assert storage.tensors().down is experts.down_proj
    assert storage.nbytes() == {"cpu": sum(p.nbytes for p in experts.parameters())}
    assert (storage.shape("up"), storage.shape("down")) == ((32, 32), (32, 16))
    experts.down_proj = nn.Parameter(torch.zeros_like(experts.down_proj))
    assert not storage_of(experts).tensors().down.any()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_dense_storage_multiplies_alone(family):
    experts = moe_layers(build_tiny(family)[0])[0].experts.double()
    storage = storage_of(experts)
    out, inner = storage.shape("up")
    rows = torch.randn(6, inner, dtype=torch.float64)
    plan = Plan(torch.arange(6), torch.tensor([0, 0, 2, 5, 5, 5, 5, 5], dtype=torch.int32))
    matrices = experts.gate_up_proj.transpose(1, 2) if experts.is_transposed else experts.gate_up_proj
    expected = torch.zeros(6, out, dtype=torch.float64)
    for row, expert in enumerate((2, 2, 3, 3, 3)):
        expected[row] = matrices[expert] @ rows[row] + (experts.gate_up_proj_bias[expert] if experts.has_bias else 0)
    torch.testing.assert_close(storage.linear(rows, "up", plan), expected)


def test_what_peft_adds_for_a_forward_is_dense():
    """Stock PEFT puts `W + BA` behind a parametrisation, whole: fused operators run on it as ever."""
    seen = []
    model = with_expert_lora(qwen_model())
    experts = moe_layers(model)[0].experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(storage_of(module)))
    model(torch.arange(6).view(1, 6))
    assert [type(storage) for storage in seen] == [DenseStorage]
    for name in NAMES:
        parametrize.register_parametrization(experts, name, Centered(), unsafe=True)
    assert isinstance(storage_of(experts), ParametrizedStorage)


def test_weights_that_only_their_module_reads_are_refused_with_a_sentence():
    model, inputs = build("qwen3_moe", torch.float32)
    for layer in moe_layers(model):
        for name in NAMES:
            weight = getattr(layer.experts, name).detach()
            setattr(layer.experts, name, nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False))
    assert isinstance(storage_of(moe_layers(model)[0].experts), UnreadableStorage)
    for name in ("hf_moe", "hf_moe_grouped", "hf_moe_reference"):
        model.set_experts_implementation(name)
        with pytest.raises(
            ValueError, match=rf"'{name}' cannot run .*stored as torch.float8_e4m3fn, which hf_moe does"
        ):
            outputs(model, inputs)
        assert "their quantiser decides which backends run them" in str(hf_moe.explain(model))
