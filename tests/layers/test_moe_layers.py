"""`moe_layers` over every decorated native family and hf_moe, bare and under everything that wraps a model."""

import copy
import inspect
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from transformers.integrations.moe import use_experts_implementation

from hf_moe.layers.moe_layers import check_index_range, checked_routing, moe_layers
from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM, HfMoeForTokenClassification
from tiny_hf_moe import DECODERS, ENCODERS, encoder_config
from tiny_hf_moe import tiny_config as tiny_hf_moe_config
from tiny_models import (
    CLASSES,
    EXPERTS,
    FAMILIES,
    HIDDEN,
    NUM_CLASSES,
    TOP_K,
    WIDTH,
    build_tiny,
    experts_class,
    tiny_config,
)

# (num_experts, top_k, hidden_size, expert_width) where the family's tiny model differs from the common one
GEOMETRY = {
    "ernie4_5_vl_moe": {(EXPERTS, TOP_K, HIDDEN, WIDTH), (EXPERTS, TOP_K, HIDDEN, WIDTH // 2)},  # text, vision experts
    "muse_spark": {(EXPERTS, TOP_K, HIDDEN // 2, WIDTH)},  # experts work in a narrower space
    "zaya": {(EXPERTS, 1, HIDDEN, WIDTH)},
}
TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# before 5.23: Jamba's router is a linear layer (logits only), Granite's returns (indices, weights, logits)
OTHER_ROUTERS = {"granitemoe", "granitemoehybrid", "granitemoeshared", "jamba"} if TRANSFORMERS < (5, 23) else set()
COVERED: dict[str, str] = {}
NOT_COVERED: dict[str, str] = {}


def geometry(layer):
    return layer.num_experts, layer.top_k, layer.hidden_size, layer.expert_width


def record_calls(layers):
    """Hook routers and experts; the list that is returned grows by (layer, router output, experts input)."""
    calls, outputs = [], {}
    for layer in layers:
        layer.router.register_forward_hook(
            lambda module, args, output, name=layer.name: outputs.update({name: output})
        )
        layer.experts.register_forward_pre_hook(
            lambda module, args, layer=layer: calls.append((layer, outputs[layer.name], args))
        )
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    NOT_COVERED[family] = "failed"
    model, inputs = build_tiny(family)
    layers = moe_layers(model)

    decorated = {name for name, module in model.named_modules() if type(module) is experts_class(family)}
    assert decorated, f"the tiny {type(model).__name__} has no {experts_class(family).__name__}"
    assert {layer.experts_name for layer in layers} == decorated
    assert {geometry(layer) for layer in layers} == GEOMETRY.get(family, {(EXPERTS, TOP_K, HIDDEN, WIDTH)})
    for layer in layers:
        assert model.get_submodule(layer.experts_name) is layer.experts
        assert model.get_submodule(layer.router_name) is layer.router
        stored = [p for p in layer.experts.parameters() if p.dim() in (2, 3) and p.shape[0] == layer.num_experts]
        assert layer.num_experts * layer.num_expert_parameters == sum(p.numel() for p in stored)

    calls = record_calls(layers)
    with torch.no_grad(), checked_routing(model):
        output = model(**inputs)[0]
    assert output.isfinite().all()
    assert [layer.name for layer, _, _ in calls] == [layer.name for layer in layers]
    for layer, returned, (hidden_states, top_k_index, top_k_weights) in calls:
        assert hidden_states.shape[-1] == layer.hidden_size
        assert top_k_index.shape == (hidden_states.shape[0], layer.top_k) == top_k_weights.shape
        if family not in OTHER_ROUTERS:
            # transformers' contract: these very tensors reach the experts
            assert returned[1] is top_k_weights
            assert returned[2] is top_k_index
            assert returned[0].shape[-1] >= layer.num_experts
    del NOT_COVERED[family]
    COVERED[family] = f"{type(model).__name__}, {len(layers)} layers"


def test_every_family_is_covered(capsys, request):
    if len(request.session.items) < len(FAMILIES):
        pytest.skip("counts what the whole file covers; only a part of it was selected")
    if hasattr(request.config, "workerinput"):
        for family in set(FAMILIES) - set(COVERED):  # other workers hold the results: build what this one lacks
            test_family(family)
    with capsys.disabled():
        print(f"\nMoE families of transformers {transformers.__version__}: {len(COVERED)} of {len(FAMILIES)} covered")
        for family in FAMILIES:
            print(f"  {family:48s}{COVERED.get(family) or 'NOT COVERED: ' + NOT_COVERED.get(family, 'not run')}")
    assert sorted(COVERED) == sorted(FAMILIES)
    known = max(version for version in CLASSES if version <= TRANSFORMERS)
    assert CLASSES[known] == NUM_CLASSES if known == TRANSFORMERS else CLASSES[known] <= NUM_CLASSES


def test_the_layout_of_the_weights_does_not_matter():
    shapes = {}
    for family in ("mixtral", "gpt_oss", "nemotron_h"):
        layer = moe_layers(build_tiny(family)[0])[0]
        assert geometry(layer) == (EXPERTS, TOP_K, HIDDEN, WIDTH)
        shapes[family] = {name: tuple(p.shape) for name, p in layer.experts.named_parameters() if p.dim() == 3}
    assert shapes == {
        "mixtral": {"gate_up_proj": (EXPERTS, 2 * WIDTH, HIDDEN), "down_proj": (EXPERTS, HIDDEN, WIDTH)},
        "gpt_oss": {"gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDTH), "down_proj": (EXPERTS, WIDTH, HIDDEN)},
        "nemotron_h": {"up_proj": (EXPERTS, WIDTH, HIDDEN), "down_proj": (EXPERTS, HIDDEN, WIDTH)},
    }


def test_latent_experts_report_the_width_that_they_see():
    (layer,) = moe_layers(build_tiny("nemotron_h", moe_latent_size=16)[0])
    assert layer.experts.hidden_dim == HIDDEN  # what the module declares is the model's width
    assert geometry(layer) == (EXPERTS, TOP_K, 16, WIDTH)


def test_vision_experts_of_different_counts():
    """Dots3-Note's vision tower: experts differ by layer, and no model records its routers."""
    dots3_note = pytest.importorskip("transformers.models.dots3_note.modeling_dots3_note")
    config = dots3_note.Dots3NoteVisionConfig(
        num_hidden_layers=3,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        intermediate_size=40,
        moe_intermediate_size=WIDTH,
        num_experts_per_tok=TOP_K,
        adapter_in_dim=HIDDEN,
        mlp_layer_types=["dense", "sparse", "sparse"],
        per_layer_config={1: {"num_local_experts": 4}, 2: {"num_local_experts": 6}},
    )
    layers = moe_layers(dots3_note.Dots3NoteVisionModel(config))
    assert [geometry(layer) for layer in layers] == [(4, TOP_K, HIDDEN, WIDTH), (6, TOP_K, HIDDEN, WIDTH)]
    assert all(layer.router_name == f"{layer.name}.gate" for layer in layers)


IDS = {"input_ids": torch.arange(4, 20).view(2, 8)}


def tiny_hf_moe(**fields):
    return HfMoeForCausalLM(tiny_hf_moe_config(**fields))


@pytest.mark.parametrize("fields", [*DECODERS.values(), *ENCODERS.values()], ids=[*DECODERS, *ENCODERS])
def test_hf_moe(fields):
    encodes = fields in ENCODERS.values()
    config = (encoder_config if encodes else tiny_hf_moe_config)(**fields)
    model = (HfMoeForTokenClassification if encodes else HfMoeForCausalLM)(config).train()
    layers = moe_layers(model)
    assert layers
    for layer in layers:
        own = config.per_layer_config[int(layer.name.split(".")[2])] if config.is_heterogeneous else config
        top_k = own.num_experts if own.routing in ("dense", "expert_choice") else own.num_experts_per_tok
        assert geometry(layer) == (own.num_experts, top_k, own.hidden_size, own.moe_intermediate_size)
        assert layer.router_name == f"{layer.name}.gate"
        stored = sum(p.numel() for p in layer.experts.parameters())
        assert layer.num_experts * layer.num_expert_parameters == stored
    with checked_routing(model) as watched:
        model(**IDS)
    assert watched == layers


TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def check_wrapped(wrapped, prefix, reference):
    """The layers of `wrapped` are those of `reference` (the same modules or copies of them), with `prefix`."""
    layers = moe_layers(wrapped)
    assert [layer.name for layer in layers] == [prefix + layer.name for layer in reference]
    assert [geometry(layer) for layer in layers] == [geometry(layer) for layer in reference]
    for layer in layers:
        assert wrapped.get_submodule(layer.experts_name) is layer.experts
        assert wrapped.get_submodule(layer.router_name) is layer.router
    return layers


@pytest.mark.parametrize("build", [lambda: build_tiny("qwen3_moe")[0], tiny_hf_moe], ids=["qwen3_moe", "hf_moe"])
def test_peft_expert_lora(build):
    model = build()
    before = moe_layers(model)
    # r=1: each LoRA matrix has exactly num_experts rows, as a router has
    config = peft.LoraConfig(r=1, target_parameters=TARGETS, target_modules=["q_proj"], lora_dropout=0.0)
    wrapped = peft.get_peft_model(model, config)
    layers = check_wrapped(wrapped, "base_model.model.", before)
    assert layers[0].experts_name == "base_model.model.model.layers.0.mlp.experts.base_layer.base_layer"
    assert [layer.experts for layer in layers] == [layer.experts for layer in before]
    assert [layer.router for layer in layers] == [layer.router for layer in before]
    with checked_routing(wrapped):
        wrapped(**IDS)


def test_peft_on_the_router():
    model = build_tiny("qwen3_moe")[0]
    before = moe_layers(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=["mlp.gate.weight"], lora_dropout=0.0))
    layers = check_wrapped(wrapped, "base_model.model.", before)
    # the module that the block calls: the router inside its LoRA
    assert layers[0].router is not before[0].router
    assert layers[0].router.get_base_layer() is before[0].router
    calls = record_calls(layers)
    wrapped(**IDS)
    assert all(output[2] is args[1] for _, output, args in calls)


def test_peft_linear_router():
    """PhiMoE's router is an nn.Linear, which PEFT replaces by its own layer."""
    model = build_tiny("phimoe")[0]
    before = moe_layers(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["router"]))
    layers = check_wrapped(wrapped, "base_model.model.", before)
    assert isinstance(layers[0].router, peft.utils.ModulesToSaveWrapper)


def test_peft_modules_to_save_on_the_experts():
    model = build_tiny("qwen3_moe")[0]
    before = moe_layers(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["experts", "gate"])
    )
    layers = check_wrapped(wrapped, "base_model.model.", before)
    assert layers[0].experts is not before[0].experts  # the copy that trains and runs
    ran = []
    layers[0].experts.register_forward_pre_hook(lambda module, args: ran.append(module))
    wrapped(**IDS)
    assert ran == [layers[0].experts]
    with wrapped.disable_adapter():
        assert moe_layers(wrapped)[0].experts is before[0].experts


def test_compiled():
    model = build_tiny("qwen3_moe")[0]
    before = moe_layers(model)
    compiled = torch.compile(model, backend="eager")
    check_wrapped(compiled, "_orig_mod.", before)
    # blocks compiled on their own, and experts alone
    model.model.layers[0].mlp = torch.compile(model.model.layers[0].mlp, backend="eager")
    model.model.layers[1].mlp.experts = torch.compile(model.model.layers[1].mlp.experts, backend="eager")
    layers = moe_layers(model)
    assert [layer.name for layer in layers] == [
        "model.layers.0.mlp._orig_mod",
        "model.layers.1.mlp",
        "model.layers.2.mlp",
    ]
    assert [layer.experts for layer in layers] == [layer.experts for layer in before]
    assert [layer.router for layer in layers] == [layer.router for layer in before]


class Parallel(nn.Module):
    """Wraps as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_parallel_wrappers():
    model, inputs = build_tiny("mixtral")
    before = moe_layers(model)
    check_wrapped(Parallel(model), "module.", before)
    model.model.layers[0].mlp.experts = Parallel(model.model.layers[0].mlp.experts)
    model.model.layers[0].mlp.gate = Parallel(model.model.layers[0].mlp.gate)
    layers = moe_layers(model)
    assert layers[0].name == "model.layers.0.mlp"
    assert layers[0].experts is before[0].experts
    assert layers[0].router.module is before[0].router
    with checked_routing(model):
        model(**inputs)


def test_all_wrappers_at_once():
    model = build_tiny("olmoe")[0]
    before = moe_layers(model)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=TARGETS, lora_dropout=0.0))
    check_wrapped(torch.compile(Parallel(wrapped), backend="eager"), "_orig_mod.module.base_model.model.", before)


class Unpack(nn.Module):
    """Stands for a dequantisation, which moe_layers must not run; bitsandbytes keeps the shape in `quant_state`."""

    def __init__(self, shape):
        super().__init__()
        self.quant_state = SimpleNamespace(shape=shape)

    def forward(self, packed):
        raise AssertionError("a weight was read")


def store_packed(experts, name, packed, shape):
    experts._parameters[name] = nn.Parameter(packed.to(torch.uint8), requires_grad=False)
    parametrize.register_parametrization(experts, name, Unpack(shape), unsafe=True)


def weights_of(layer):
    return {name: p.detach() for name, p in layer.experts.named_parameters() if p.dim() == 3}


@pytest.mark.parametrize("storage", ["last_dim_packed", "flattened", "flattened_without_state"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_parametrised_weights(family, storage):
    model = build_tiny(family)[0]
    before = [geometry(layer) for layer in moe_layers(model)]
    for layer in moe_layers(model):
        for name, weight in weights_of(layer).items():
            packed = weight[..., ::2] if storage == "last_dim_packed" else weight.reshape(-1, 1)[::2]
            store_packed(layer.experts, name, packed, weight.shape if storage == "flattened" else None)
    assert [geometry(layer) for layer in moe_layers(model)] == before


def test_flattened_weights_of_latent_experts():
    """Here only the quantisation state knows: the module declares the width of the model."""
    model = build_tiny("nemotron_h", moe_latent_size=16)[0]
    (layer,) = moe_layers(model)
    for name, weight in weights_of(layer).items():
        store_packed(layer.experts, name, weight.reshape(-1, 1)[::2], weight.shape)
    assert geometry(moe_layers(model)[0]) == (EXPERTS, TOP_K, 16, WIDTH)


def test_int8_weights():
    model = build_tiny("qwen3_moe")[0]
    before = [geometry(layer) for layer in moe_layers(model)]
    for layer in moe_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            weight = layer.experts._parameters.pop(name)
            scale = weight.detach().abs().amax(-1, keepdim=True) / 127
            layer.experts.register_buffer(name, (weight.detach() / scale).round().to(torch.int8))
            layer.experts.register_buffer(f"{name}_scale", scale)
    assert [geometry(layer) for layer in moe_layers(model)] == before
    assert moe_layers(model)[0].num_expert_parameters == 3 * HIDDEN * WIDTH


@pytest.mark.parametrize("expert_dtype", ["fp8", "fp4"])
def test_the_hosts_quantised_experts(expert_dtype):
    """transformers' FP8 experts replace the module; its FP4 keeps two values of the last dimension in one int8."""
    model = build_tiny("qwen3_moe")[0]
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    fields = {} if expert_dtype == "fp8" else {"expert_dtype": expert_dtype}
    if fields.keys() - inspect.signature(fp8.FP8Experts).parameters.keys():
        pytest.skip(f"transformers {transformers.__version__} has no {expert_dtype} experts")
    decorated = use_experts_implementation(type("Experts", (fp8.FP8Experts,), {}))
    for index, layer in enumerate(moe_layers(model)):
        block = model.get_submodule(layer.name)
        block.experts = decorated(model.config, block_size=(8, 8), **fields)
        assert geometry(moe_layers(model)[index]) == (EXPERTS, TOP_K, HIDDEN, WIDTH)


def test_weights_without_a_shape_need_a_declared_geometry():
    model = build_tiny("mixtral")[0]
    experts = moe_layers(model)[1].experts
    del experts.down_proj, experts.intermediate_dim
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts.*intermediate_dim"):
        moe_layers(model)


def test_meta_device():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(num_hidden_layers=4))
    assert {geometry(layer) for layer in moe_layers(model)} == {(128, 8, 2048, 768)}


def test_dense_and_undecorated_models_have_no_layers():
    dense = transformers.LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4
    )
    assert moe_layers(transformers.LlamaForCausalLM(dense)) == []
    switch = transformers.SwitchTransformersConfig(
        vocab_size=96, d_model=32, d_ff=24, d_kv=8, num_heads=4, num_layers=2, num_decoder_layers=2, num_experts=4
    )
    assert moe_layers(transformers.SwitchTransformersForConditionalGeneration(switch)) == []


@use_experts_implementation
class OwnExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = EXPERTS, HIDDEN, WIDTH
        self.act_fn = nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * WIDTH, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


class OwnBlock(nn.Module):
    """Custom code: the block chooses the top k itself from the logits of a linear layer."""

    def __init__(self, config, router):
        super().__init__()
        self.scorer = router
        self.dense = nn.Linear(HIDDEN, HIDDEN)
        self.experts = OwnExperts(config)

    def forward(self, hidden_states):
        return self.experts(hidden_states, *self.scorer(hidden_states).topk(TOP_K)[::-1])


CONFIG = SimpleNamespace(num_experts_per_tok=TOP_K, _experts_implementation="eager")


def test_block_that_routes_by_itself():
    model = nn.ModuleList([OwnBlock(CONFIG, nn.Linear(HIDDEN, EXPERTS)), OwnBlock(CONFIG, nn.Identity())])
    scored, unscored = moe_layers(model)
    assert scored.router is model[0].scorer  # yields logits only
    assert geometry(scored) == (EXPERTS, TOP_K, HIDDEN, WIDTH)
    assert unscored.router is None
    assert unscored.router_name is None
    assert moe_layers(model[0])[0].name == ""


def test_a_router_that_declares_its_top_k_wins_over_a_matrix_of_the_same_shape():
    block = OwnBlock(CONFIG, nn.Linear(HIDDEN, EXPERTS))
    block.dense = nn.Linear(HIDDEN, EXPERTS)
    assert moe_layers(block)[0].router is None  # ambiguous: nothing is guessed
    block.scorer.top_k = 3
    (layer,) = moe_layers(block)
    assert layer.router is block.scorer
    assert layer.top_k == 3


def test_unknown_top_k():
    block = OwnBlock(SimpleNamespace(_experts_implementation="eager"), nn.Linear(HIDDEN, EXPERTS))
    with pytest.raises(ValueError, match=r"declares no integer `top_k`.*num_experts_per_tok.*Set `top_k`"):
        moe_layers(block)


def test_check_index_range():
    layer = moe_layers(tiny_hf_moe())[1]
    check_index_range(layer, torch.tensor([[0, EXPERTS - 1]]))
    check_index_range(layer, torch.empty(0, TOP_K, dtype=torch.long))
    for ids, value in (([[0, -1]], -1), ([[EXPERTS, 1]], EXPERTS)):
        with pytest.raises(ValueError, match=rf"'model\.layers\.1\.mlp' must lie in \[0, 7\].*got {value}\..*gate"):
            check_index_range(layer, torch.tensor(ids))
    with pytest.raises(TypeError, match=r"'model\.layers\.1\.mlp' must be integers, got torch\.float32"):
        check_index_range(layer, torch.zeros(1, TOP_K))


def test_skipped_slots_need_a_declaration():
    layer = moe_layers(tiny_hf_moe(num_null_experts=1))[0]
    check_index_range(layer, torch.tensor([[EXPERTS, 0]]))
    with pytest.raises(ValueError, match=r"\[0, 8\] \(8 experts; 8 marks a skipped slot\), got 9"):
        check_index_range(layer, torch.tensor([[EXPERTS + 1, 0]]))


def test_checked_routing_catches_a_bad_router_and_cleans_up():
    model, inputs = build_tiny("mixtral")
    router = moe_layers(model)[2].router
    handle = router.register_forward_hook(lambda module, args, out: (out[0], out[1], out[2] + EXPERTS))
    with checked_routing(model), pytest.raises(ValueError, match=r"model\.layers\.2\.mlp.*in \[0, 7\]"):
        model(**inputs)
    handle.remove()
    assert not any(layer.experts._forward_pre_hooks for layer in moe_layers(model))


def test_deepcopy_and_attribute_access_do_not_confuse():
    """Wrappers that forward attributes (PEFT does) carry the marks only by delegation."""
    model = build_tiny("mixtral")[0]

    class Delegating(Parallel):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.module, name)

    block = model.model.layers[0].mlp
    block.experts = Delegating(block.experts)
    assert len(moe_layers(copy.deepcopy(model))) == len(moe_layers(model)) == 3


def test_tiny_config_takes_overrides():
    assert tiny_config("mixtral", num_hidden_layers=1).num_hidden_layers == 1
