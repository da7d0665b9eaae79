"""Whatever changes a base while an adapter is loaded is found, and put back where its values still exist."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from hf_moe.adapters.load_adapter import AdapterError, load_adapter
from hf_moe.adapters.unchanged_base import BaseOutputs, BaseState, KeyedHash
from tiny_moe import hf_moe_model

IDS = torch.arange(12).view(2, 6)


@pytest.fixture
def folder(tmp_path):
    get_peft_model(hf_moe_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    return tmp_path


def base_of(model):
    return model.get_base_model().model


def write_through_data(model):
    base_of(model).layers[1].mlp.experts.down_proj.data[0, 0, 0] += 1e-3


def write_in_place(model):
    with torch.no_grad():
        base_of(model).embed_tokens.weight[3].neg_()


def write_a_buffer(model):
    base_of(model).layers[0].mlp.gate.e_score_correction_bias.data.add_(1)


def replace_storage(model):
    base_of(model).norm.weight.data = base_of(model).norm.weight.data + 1


def replace_a_parameter(model):
    base_of(model).norm.weight = nn.Parameter(base_of(model).norm.weight.detach() * 2)


def replace_a_module(model):
    base_of(model).layers[0].self_attn.o_proj = nn.Linear(32, 32, bias=False)


def turn_around(model):
    """No tensor changes."""
    base_of(model).norm.register_forward_hook(lambda module, args, output: -output)


LOST = {"data": write_through_data, "in place": write_in_place, "buffer": write_a_buffer}
KEPT = {"storage": replace_storage, "parameter": replace_a_parameter, "module": replace_a_module, "hook": turn_around}


@pytest.mark.parametrize("change", [*LOST, *KEPT])
def test_a_changed_base_is_found(change, folder, monkeypatch):
    attach = PeftModel.from_pretrained

    def attach_and_change(*args, **kwargs):
        model = attach(*args, **kwargs)
        (LOST | KEPT)[change](model)
        return model

    monkeypatch.setattr(PeftModel, "from_pretrained", attach_and_change)
    base = hf_moe_model(router_scoring="sigmoid", router_bias=True)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    logits = base(input_ids=IDS).logits
    with pytest.raises(AdapterError, match=r"is refused, because it changes its base: .*") as refusal:
        load_adapter(base, folder)
    assert ("load the base again" in str(refusal.value)) == (change in LOST)
    assert list(base.state_dict()) == list(before)
    if change in KEPT:
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
        assert torch.equal(base(input_ids=IDS).logits, logits)


def test_an_interruption_leaves_the_base(folder, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    base = hf_moe_model()
    names = list(base.state_dict())
    monkeypatch.setattr(PeftModel, "load_adapter", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_adapter(base, folder)
    assert list(base.state_dict()) == names
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_tied_quantised_and_absent_values():
    model = hf_moe_model(tie_word_embeddings=True)
    model.register_buffer("packed", torch.arange(5, dtype=torch.uint8))
    model.register_buffer("nowhere", torch.empty(3, device="meta"))
    state = BaseState(model)
    assert state.difference(model) is None
    model.lm_head.weight.data[0, 0] += 1
    assert state.difference(model) == "model.embed_tokens.weight has other values"
    model.lm_head.weight.data[0, 0] -= 1
    model.packed[4] = 0
    assert state.difference(model) == "packed has other values"


def test_a_tensor_made_of_others_is_each_of_them():
    """As weights that are sharded or quantised are."""
    model = hf_moe_model()
    parts = [model.model.norm.weight.detach().clone() for _ in range(2)]
    model.model.norm.weight = nn.Parameter(TwoTensor(*parts))
    state = BaseState(model)
    state.restore()
    assert state.difference(model) is None
    parts[1][0] += 1
    assert state.difference(model) == "model.norm.weight has other values"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool])
@pytest.mark.parametrize("size", [1, 3, 2**18, 2**18 + 1])
def test_every_bit_counts(dtype, size):
    generator = torch.Generator().manual_seed(size)
    values = torch.randint(0, 2, (size + 1,), generator=generator).to(dtype)[1:]
    keyed = KeyedHash()
    whole = keyed.of(values)
    assert keyed.of(values.clone()) == whole
    octets = values.clone().view(torch.uint8)
    for position in {0, len(octets) // 2, len(octets) - 1}:
        for bit in range(8):
            octets[position] ^= 1 << bit
            assert keyed.of(octets.view(dtype)) != whole
            octets[position] ^= 1 << bit
    assert keyed.of(values.reshape(1, -1)) != whole


def test_what_cancels_in_a_sum_counts():
    values = torch.arange(1.0, 2**19 + 1)
    keyed = KeyedHash()
    whole = keyed.of(values)
    swapped, negated, moved = values.clone(), values.clone(), values.clone()
    swapped[[0, 5]] = swapped[[5, 0]]
    negated[:6] *= -1  # only top bits, an even number of them
    moved[: 2**18], moved[2**18 :] = values[2**18 :], values[: 2**18]
    assert whole not in (keyed.of(swapped), keyed.of(negated), keyed.of(moved))
    square = values.view(512, -1)
    assert keyed.of(square.T) == keyed.of(square.T.contiguous()) != keyed.of(square)
    assert KeyedHash().of(values) != whole, "the key is new"


def test_a_base_whose_kernels_are_others_once_it_is_frozen_is_unchanged(folder):
    """Jamba was refused on processors where torch computes a frozen conv1d in another way."""
    model = hf_moe_model()
    norm = model.model.norm
    norm.register_forward_hook(lambda module, args, output: output + 1e-6 * module.weight.requires_grad)
    loaded = load_adapter(model, folder)
    assert not norm.weight.requires_grad
    outputs = BaseOutputs(loaded, loaded.get_base_model())
    norm.requires_grad_(True)
    assert outputs.are_those_of(loaded)
    assert norm.weight.requires_grad
