"""An exported adapter computes what the adapter computes, and nothing half-written or unfit is left behind."""

import contextlib
import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize

import hf_moe
from hf_moe.adapters import per_expert
from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.export import AdapterExportError, export_adapter
from hf_moe.adapters.frozen_router import HASH_FILE, save_router_hash
from hf_moe.adapters.load_adapter import AdapterError
from hf_moe.adapters.per_expert import layout_of
from tiny_lora import RANK, adapted, build, fill, outputs
from tiny_models import FAMILIES

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# float32 where the model computes in it whatever its weights are
FLOAT32_INSIDE = ("nemotron_h", "inkling2", "inkling2_loop")
NAMES = {
    "qwen3_moe": ("mlp.experts.7.", ("gate_proj", "up_proj", "down_proj")),
    "mixtral": ("block_sparse_moe.experts.7.", ("w1", "w3", "w2")),
    "olmoe": ("mlp.experts.7.", ("gate_proj", "up_proj", "down_proj")),
}


def saved(tmp_path, family="qwen3_moe", **options):
    """A saved adapter, the model under it, its inputs and the adapter's outputs."""
    model, inputs = build(family, torch.float32 if family in FLOAT32_INSIDE else torch.float64)
    tuned = adapted(model, **options)
    base = tmp_path.with_name(f"{tmp_path.name}-base")
    model.config.save_pretrained(base)
    tuned.peft_config["default"].base_model_name_or_path = str(base)
    tuned.save_pretrained(tmp_path / "adapter")
    return model, inputs, outputs(tuned, inputs)


@pytest.mark.parametrize("family", ["hf_moe", *FAMILIES])
def test_every_family_is_read_as_it_was_or_refused(family, tmp_path):
    """By stock PEFT and by load_adapter, with factors beside the experts that targets could be mistaken for."""
    model, inputs = build(family, torch.float32)
    for options in ({"attention": True, "shared_experts": True}, {"attention": True}, {"shared_experts": True}, {}):
        with contextlib.suppress(ValueError):
            expert_lora_config(model, **options)
            break
    model, inputs, expected = saved(tmp_path, family, **options)
    layout = layout_of(model.config.model_type)
    try:
        export_adapter(tmp_path / "adapter", tmp_path / "out")
    except AdapterExportError:
        assert layout is None or family in NOT_READ
        assert not (tmp_path / "out").exists()
        return
    assert layout is not None
    assert (outputs(model, inputs) - expected).abs().max() > 1e-3
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    named = {name for name in config["target_modules"] if name.rpartition(".")[2] in (*layout.names, "gate_up_proj")}
    assert all(re.fullmatch(r"experts\.(\d+\.)?\w+|.*shared.*|.*(attn|attention).*", name) for name in named)
    for read in (PeftModel.from_pretrained, hf_moe.load_adapter):
        torch.testing.assert_close(outputs(read(copy.deepcopy(model), tmp_path / "out"), inputs), expected)


# PEFT 0.21.2 merges gate_up_proj and down_proj alone; it renames Laguna's shared experts to a name with two
# dots, and knows single experts of Mistral-Large-4 in the whole model only
NOT_READ = ("nemotron_h", "laguna", "mistral_large4")


@pytest.mark.parametrize("family", NAMES)
def test_stock_peft_loads_it_with_equal_outputs(family, tmp_path):
    model, inputs, expected = saved(tmp_path, family, attention=True)
    assert export_adapter(tmp_path / "adapter", tmp_path / "out" / "per_expert") == tmp_path / "out" / "per_expert"
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out" / "per_expert")
    torch.testing.assert_close(outputs(loaded, inputs), expected)
    accelerate_adapters(loaded)
    torch.testing.assert_close(outputs(loaded, inputs), expected)


@pytest.mark.parametrize("family", NAMES)
def test_every_expert_has_factors_of_its_own(family, tmp_path):
    saved(tmp_path, family, attention=True)
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "out"))
    path, names = NAMES[family]
    prefix = "base_model.model.model.layers.2." + path
    shapes = {name: [tuple(after[f"{prefix}{name}.lora_{f}.weight"].shape) for f in "AB"] for name in names}
    up = [(RANK, 32), (24, RANK)]
    assert shapes == dict(zip(names, (up, up, [(RANK, 24), (32, RANK)]), strict=True))
    assert len([key for key in after if ".experts." in key]) == 3 * 8 * 3 * 2
    attention = {key for key in before if "self_attn" in key}
    assert attention
    assert all(torch.equal(after[key], before[key]) for key in attention)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert {f"experts.7.{name}" for name in names} <= set(config["target_modules"])
    # SGLang wraps experts only if one of its own names is a target
    assert {"gate_up_proj", "gate_proj"} & {name.rpartition(".")[2] for name in config["target_modules"]}
    assert config["target_parameters"] is None
    assert not config["rank_pattern"]


def test_shared_experts_stay_targeted_parameters(tmp_path):
    model, inputs, expected = saved(tmp_path, "deepseek_v3", shared_experts=True)
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    torch.testing.assert_close(outputs(loaded, inputs), expected)


def test_a_process_without_hf_moe_reads_it(tmp_path):
    model, inputs, expected = saved(tmp_path)
    model.save_pretrained(tmp_path / "model")
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    torch.save(inputs, tmp_path / "inputs.pt")
    code = """
import sys
sys.modules["hf_moe"] = None  # whoever imports it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model", dtype="float64", experts_implementation="eager")
model = PeftModel.from_pretrained(model, "out")
torch.save(model(**torch.load("inputs.pt")).logits, "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


def test_the_other_nesting_is_read_from_the_shapes(tmp_path):
    """Over parametrised weights PEFT nests the projections the other way round, and keys name neither."""
    model, inputs = build("qwen3_moe")
    plain = copy.deepcopy(model)
    for layer in hf_moe.moe_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(layer.experts, name, torch.nn.Identity(), unsafe=True)
    tuned = fill(get_peft_model(model, expert_lora_config(model, r=RANK)))
    accelerate_adapters(tuned)
    expected = outputs(tuned, inputs)
    tuned.save_pretrained(tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(outputs(PeftModel.from_pretrained(plain, tmp_path / "out"), inputs), expected)


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_peft_finds_single_experts_and_nothing_beside_them(family, tmp_path):
    """As models of transformers 4 have them."""
    saved(tmp_path, family)
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    layers = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    beside = {re.sub(r"experts\.\d+", "shared_expert", name) for name in layers}
    beside |= {re.sub(r"\.experts\.\d+", "", name) for name in layers}
    model = torch.nn.Module()
    for name in layers | beside:
        owner, _, last = name.rpartition(".")
        *_, module = iterate_modules(model, owner)
        a, b = (tensors.get(f"base_model.model.{name}.lora_{factor}.weight", torch.zeros(4, 4)) for factor in "AB")
        module.add_module(last, torch.nn.Linear(a.shape[1], len(b), dtype=torch.float64))
    loaded = PeftModel.from_pretrained(model, tmp_path / "out")
    found = get_peft_model_state_dict(loaded)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


def iterate_modules(model, path):
    """The modules on the way to `path`, made where they are not there."""
    for part in path.split("."):
        if part not in model._modules:
            model.add_module(part, torch.nn.Module())
        model = model._modules[part]
        yield model


def test_a_rank_stabilised_scale_survives_the_doubled_rank(tmp_path):
    """PEFT doubles rank and alpha of the fused projection, which would make alpha / sqrt(r) larger by sqrt(2)."""
    model, inputs, expected = saved(tmp_path, use_rslora=True)
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    for read in (PeftModel.from_pretrained, hf_moe.load_adapter):
        torch.testing.assert_close(outputs(read(copy.deepcopy(model), tmp_path / "out"), inputs), expected)


def test_an_export_that_stock_peft_would_put_elsewhere_is_refused(tmp_path):
    """Its importer has no layers: it would add factors to the experts of every layer."""
    saved(tmp_path, layers_to_transform=[1])
    with pytest.raises(AdapterExportError, match=r"stock PEFT finds nothing in the file for '.*layers\.0\.mlp"):
        export_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    model, inputs, expected = saved(tmp_path, "qwen2_moe", layers_to_transform=[1])
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    for read in (PeftModel.from_pretrained, hf_moe.load_adapter):
        torch.testing.assert_close(outputs(read(copy.deepcopy(model), tmp_path / "out"), inputs), expected)


SPOILT = {
    "values": (lambda pairs: {key: value * 2 for key, value in pairs.items()}, "is not what the adapter holds"),
    "names": (lambda pairs: {key.replace("up", "odd"): value for key, value in pairs.items()}, "lacks lora_A"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_was_written_is_read_back(case, tmp_path, monkeypatch):
    saved(tmp_path)
    spoil, message = SPOILT[case]
    unfold = per_expert.unfold
    monkeypatch.setattr(per_expert, "unfold", lambda *arguments: spoil(unfold(*arguments)))
    with pytest.raises(AdapterExportError, match=message):
        export_adapter(tmp_path / "adapter", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_export_with_bare_names_is_read_too(tmp_path):
    """As hf_moe wrote them before: PEFT on other families took them for shared experts and left the experts alone."""
    model, inputs, expected = saved(tmp_path, "qwen2_moe", attention=True)
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    bare = ["gate_proj", "up_proj", "down_proj", *(f"self_attn.{name}_proj" for name in "kqvo")]
    edit_config(target_modules=bare, target_parameters=None, rank_pattern={}, alpha_pattern={})(tmp_path / "out")
    loaded = hf_moe.load_adapter(model, tmp_path / "out")
    torch.testing.assert_close(outputs(loaded, inputs), expected)


def test_load_adapter_reads_it_over_parametrised_weights(tmp_path):
    model, inputs, expected = saved(tmp_path)
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    for layer in hf_moe.moe_layers(model):
        for name in ("gate_up_proj", "down_proj"):
            parametrize.register_parametrization(layer.experts, name, torch.nn.Identity(), unsafe=True)
    torch.testing.assert_close(outputs(hf_moe.load_adapter(model, tmp_path / "out"), inputs), expected)


BROKEN_EXPORTS = {
    "no_expert": (lambda key: ".experts.3." not in key, "lacks lora_A of expert 3's down_proj"),
    "no_factor": (lambda key: ".7.up_proj.lora_B" not in key, "lacks lora_B of expert 7's up_proj"),
}


@pytest.mark.parametrize("case", BROKEN_EXPORTS)
def test_a_broken_export_is_refused(case, tmp_path):
    model, _, _ = saved(tmp_path)
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    keep, message = BROKEN_EXPORTS[case]
    kept = {key: value for key, value in load_file(tmp_path / "out" / WEIGHTS).items() if keep(key)}
    save_file(kept, tmp_path / "out" / WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        hf_moe.load_adapter(model, tmp_path / "out")


def renamed(to):
    return lambda tensors: tensors | {ONE.replace(".7.", to): tensors[ONE].clone()}


ONE = "base_model.model.model.layers.0.mlp.experts.7.up_proj.lora_A.weight"
HOSTILE_EXPORTS = {
    "a number that takes all memory": (renamed(".900000000."), "lacks lora_A of expert 8's down_proj"),
    "a number that is none": (renamed(f".{'9' * 5000}."), "names no projection of an expert"),
    "an expert twice": (renamed(".07."), r"experts\.07\.up_proj.*names no projection of an expert"),
    "one of another shape": (lambda tensors: tensors | {ONE: torch.ones(3, 32)}, "matrices of one rank"),
    "no matrices": (lambda tensors: {key: value.flatten() for key, value in tensors.items()}, "matrices of one rank"),
    "values": (lambda tensors: {key: value / 0 for key, value in tensors.items()}, "out/adapter.*holds NaN or inf"),
}


@pytest.mark.parametrize("case", HOSTILE_EXPORTS)
def test_a_hostile_export_is_refused_before_it_costs_anything(case, tmp_path):
    model, _, _ = saved(tmp_path)
    out = export_adapter(tmp_path / "adapter", tmp_path / "out")
    change, message = HOSTILE_EXPORTS[case]
    save_file(change(load_file(out / WEIGHTS)), out / WEIGHTS)
    with pytest.raises(AdapterError, match=message):
        hf_moe.load_adapter(model, out)


def test_an_export_has_the_record_of_the_routers(tmp_path):
    model, inputs, expected = saved(tmp_path)
    save_router_hash(tmp_path / "adapter", model)
    out = export_adapter(tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(outputs(hf_moe.load_adapter(model, out, strict_router=True), inputs), expected)
    other = build("qwen3_moe", seed=1)[0]
    with pytest.raises(AdapterError, match=f"the routers differ from those that '{out}'"):
        hf_moe.load_adapter(other, out, strict_router=True)
    (out / HASH_FILE).unlink()
    (out / HASH_FILE).mkdir()
    with pytest.raises(AdapterError, match="is no file that can be read"):
        hf_moe.load_adapter(other, out)


def test_pairs_with_an_a_of_their_own_are_refused(tmp_path):
    model, _, _ = saved(tmp_path)
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    edit_weights(lambda key, value: value + 1 if key.endswith("up_proj.lora_A.weight") else value)(tmp_path / "out")
    with pytest.raises(AdapterError, match="have an A of their own each"):
        hf_moe.load_adapter(model, tmp_path / "out")


def test_other_models_and_patterns_are_refused(tmp_path):
    saved(tmp_path)
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(AdapterError, match="'gpt_oss' has no checkpoints of single experts"):
        hf_moe.load_adapter(build("gpt_oss")[0], tmp_path / "out")
    with pytest.raises(AdapterError, match=r"has no experts 'model\.layers\.2"):
        hf_moe.load_adapter(build("qwen3_moe", num_hidden_layers=2)[0], tmp_path / "out")
    edit_config(rank_pattern={"q_proj": 2})(tmp_path / "out")
    with pytest.raises(AdapterError, match="rank_pattern 'q_proj' cannot be joined"):
        hf_moe.load_adapter(build("qwen3_moe")[0], tmp_path / "out")
    edit_config(rank_pattern={}, target_modules=".*experts.*")(tmp_path / "out")
    with pytest.raises(AdapterError, match="target_modules is one pattern"):
        hf_moe.load_adapter(build("qwen3_moe")[0], tmp_path / "out")


def test_hf_moe_names_them_as_its_checkpoints_do(tmp_path):
    saved(tmp_path, "hf_moe")
    export_adapter(tmp_path / "adapter", tmp_path / "out")
    keys = load_file(tmp_path / "out" / WEIGHTS).keys()
    assert any(key.endswith("experts.7.down_proj.lora_B.weight") for key in keys)
    assert any(key.endswith("experts.0.up_proj.lora_A.weight") for key in keys)


def test_the_model_type_comes_from_the_base_or_the_caller(tmp_path):
    saved(tmp_path)
    path = tmp_path / "adapter" / CONFIG
    config = json.loads(path.read_text()) | {"auto_mapping": None}
    for base, message in ((None, "give its model_type"), (str(tmp_path / "gone"), "cannot be read")):
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(AdapterExportError, match=message):
            export_adapter(tmp_path / "adapter", tmp_path / "out")
    export_adapter(tmp_path / "adapter", tmp_path / "given", model_type="qwen3_moe")
    build("qwen3_moe")[0].config.save_pretrained(tmp_path / "gone")
    export_adapter(tmp_path / "adapter", tmp_path / "found")
    assert (tmp_path / "given" / WEIGHTS).read_bytes() == (tmp_path / "found" / WEIGHTS).read_bytes()


# What is refused, and that nothing is left


def edit_config(**changes):
    def edit(folder):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change):
    def edit(folder):
        tensors = load_file(folder / WEIGHTS)
        changed = {key: change(key, value) for key, value in tensors.items()}
        save_file({key: value.contiguous() for key, value in changed.items() if value is not None}, folder / WEIGHTS)

    return edit


BROKEN = {
    "no_config": (lambda folder: (folder / CONFIG).unlink(), "holds no adapter_config.json"),
    "no_weights": (lambda folder: (folder / WEIGHTS).unlink(), "holds no adapter_model.safetensors"),
    "no_json": (lambda folder: (folder / CONFIG).write_text("{"), "is not valid JSON"),
    "rank_pattern": (edit_config(rank_pattern={"down_proj": 2}), "take one rank and one alpha"),
    "alpha_pattern": (edit_config(alpha_pattern={"down_proj": 2}), "take one rank and one alpha"),
    "another_rank": (edit_config(r=3), r"experts \* r rows or columns, r=3"),
    "a_pattern": (edit_config(target_modules=".*q_proj"), "only a list can take the experts in"),
    "another_width": (
        edit_weights(lambda key, value: value[:5] if key.endswith("base_layer.lora_B.weight") else value),
        "fit no experts of two projections",
    ),
    "one_projection": (
        edit_weights(lambda key, value: None if "layers.1.mlp.experts.base" in key else value),
        "is of one projection alone",
    ),
    "fused_on_disk": (
        edit_config(auto_mapping={"parent_library": "transformers.models.gpt_oss.modeling_gpt_oss"}),
        "checkpoints of 'gpt_oss' hold no expert by itself",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unfit_folders_are_refused(case, tmp_path):
    saved(tmp_path)
    spoil, message = BROKEN[case]
    spoil(tmp_path / "adapter")
    with pytest.raises(AdapterExportError, match=message):
        export_adapter(tmp_path / "adapter", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_adapters_without_experts_or_of_another_method_are_refused(tmp_path):
    model, _ = build("qwen3_moe")
    get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "attention")
    with pytest.raises(AdapterExportError, match="no factors of two projections of fused experts"):
        export_adapter(tmp_path / "attention", tmp_path / "out")
    ia3 = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    get_peft_model(copy.deepcopy(model), ia3).save_pretrained(tmp_path / "ia3")
    with pytest.raises(AdapterExportError, match="an adapter of type 'IA3', not LORA"):
        export_adapter(tmp_path / "ia3", tmp_path / "out")
    with pytest.raises(ValueError, match="format must be one of per_expert, got 'fused'"):
        export_adapter(tmp_path / "attention", tmp_path / "out", format="fused")


def test_existing_files_are_never_touched(tmp_path):
    saved(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for target in (tmp_path / "out", tmp_path / "out" / "notes.txt", tmp_path / "adapter"):
        with pytest.raises(FileExistsError, match="name a new folder"):
            export_adapter(tmp_path / "adapter", target)
    (tmp_path / "empty").mkdir()
    export_adapter(tmp_path / "adapter", tmp_path / "empty")


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    saved(tmp_path)

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("json.dumps", stop)
    with pytest.raises(KeyboardInterrupt):
        export_adapter(tmp_path / "adapter", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
