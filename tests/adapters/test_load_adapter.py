"""An adapter from elsewhere gives exactly what its file holds, or an error that names what is wrong."""

import json
import pickle
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from hf_moe.adapters.expert_lora import ParamWrapper as AcceleratedParamWrapper
from hf_moe.adapters.frozen_router import HASH_FILE, RouterNotFrozenError, save_router_hash
from hf_moe.adapters.load_adapter import CONFIG, WEIGHTS, AdapterError, load_adapter
from tiny_moe import EXPERT_PARAMETERS, hf_moe_model, qwen_model, with_expert_lora

IDS = torch.arange(12).view(2, 6)
ATTENTION = ["q_proj", "v_proj"]


def trained(model):
    """The adapter's values do something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    """An adapter on experts with weights that do something, and its base's logits with it."""
    model = trained(with_expert_lora(qwen_model()))
    model.save_pretrained(tmp_path / "adapter")
    save_router_hash(tmp_path / "adapter", model)
    return tmp_path / "adapter", model(input_ids=IDS).logits


def assert_as_before(model, base):
    """`model` is usable, and what `base` is: names, values, flags, outputs."""
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert [module.training for module in model.modules()] == [module.training for module in base.modules()]
    assert torch.equal(model(input_ids=IDS).logits, base(input_ids=IDS).logits)


def test_it_loads_what_was_saved(saved):
    folder, logits = saved
    loaded = load_adapter(qwen_model(), folder)
    torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert any(isinstance(module, AcceleratedParamWrapper) for module in loaded.modules())


def test_it_can_be_trained_on(saved):
    assert any(p.requires_grad for p in load_adapter(qwen_model(), saved[0], "law", is_trainable=True).parameters())


def test_another_router_is_refused_when_asked_for(saved):
    assert load_adapter(qwen_model(), saved[0], strict_router=True)
    for documented in (AdapterError, RouterNotFrozenError):
        with pytest.raises(documented, match="the routers differ"):
            load_adapter(qwen_model(seed=1), saved[0], strict_router=True)


def lora(**fields):
    return LoraConfig(r=2, **{"target_modules": ATTENTION, **fields})


HARMLESS = {
    "experts and attention": lora(target_parameters=EXPERT_PARAMETERS),
    "dora": lora(use_dora=True),
    "rslora and patterns": lora(use_rslora=True, rank_pattern={"layers.0.*q_proj": 4}, alpha_pattern={"v_proj": 3}),
    "one regular expression": lora(target_modules=r".*layers\.1\..*(q|v)_proj"),
    "orthogonal": lora(init_lora_weights="orthogonal"),
    "eva": lora(init_lora_weights="eva"),
    "biases of the factors": lora(lora_bias=True),
    "from an invocation on": lora(alora_invocation_tokens=[1, 2], task_type="CAUSAL_LM"),
    "trained tokens": lora(trainable_token_indices=[1, 5]),
    "copies of embeddings": lora(modules_to_save=["embed_tokens", "lm_head"]),
    "copies of norms": lora(modules_to_save=["norm"]),
    "ia3": IA3Config(target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"]),
    "loha": LoHaConfig(r=2, target_modules=ATTENTION),
    "lokr": LoKrConfig(r=2, target_modules=ATTENTION),
}
if Version(version("peft")) >= Version("0.21"):  # older versions cannot save them
    from hf_moe.adapters.adapter_experts import AdapterExpertsConfig

    HARMLESS["adapter experts"] = AdapterExpertsConfig(adapter_width=8)


@pytest.mark.parametrize("case", HARMLESS)
@pytest.mark.filterwarnings("ignore:Could not find")
def test_what_only_adds_is_loaded(case, tmp_path):
    model = trained(get_peft_model(qwen_model(), HARMLESS[case]))
    model.save_pretrained(tmp_path)
    base = qwen_model()
    loaded = load_adapter(base, tmp_path, accelerate=False)
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with loaded.disable_adapter():
        assert torch.equal(loaded(input_ids=IDS).logits, qwen_model()(input_ids=IDS).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert fields_of(tmp_path / "again") | {"eva_config": None} == fields_of(tmp_path) | {"eva_config": None}


def fields_of(folder):
    """Lists sorted: PEFT keeps some of them as sets."""
    fields = json.loads((folder / CONFIG).read_text())
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


def config(**changes):
    def spoil(folder):
        path = folder / CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def weights(change):
    def spoil(folder):
        tensors = load_file(folder / WEIGHTS)
        first = sorted(tensors)[0]
        change(tensors, first)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def retyped(dtype, value=1):
    def change(tensors, first):
        tensors[first] = torch.full(tensors[first].shape, value, dtype=dtype)

    return weights(change)


def with_tensor(name, value):
    return weights(lambda tensors, first: tensors.update({f"base_model.model.model.{name}": value}))


def both(*spoils):
    return lambda folder: [spoil(folder) for spoil in spoils]


def hash_file(text):
    return lambda folder: (folder / HASH_FILE).write_text(text)


def no_hash_file(put):
    def spoil(folder):
        (folder / HASH_FILE).unlink()
        put(folder / HASH_FILE)

    return spoil


def set_nan(tensors, first):
    tensors[first][0, 0] = float("nan")


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({}))


def cut(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1])


BROKEN = {
    "huge rank": (config(r=10**9), "r in .* integer from 1 to"),
    "rank of another type": (config(r="4"), "got '4'"),
    "huge rank by pattern": (config(rank_pattern={"x": 10**9}), "rank_pattern in"),
    "rank explained by no element": (
        both(weights(lambda tensors, first: tensors.update(e=torch.empty(0, 10**9))), config(r=10**9)),
        "r in .* integer from 1 to",
    ),
    "rank of one long tensor": (
        both(weights(lambda tensors, first: tensors.update(e=torch.ones(10**6, 1))), config(r=10**6)),
        "describes 1,792,000,000 values, and .* holds 1,003,584",
    ),
    "only a number": (lambda folder: save_file({"x": torch.tensor(1.0)}, folder / WEIGHTS), "from 1 to 1 "),
    "no rank": (config(r=0), "r in .* integer from 1 to .* got 0"),
    "negative rank": (config(r=-1), "r in .* integer from 1 to"),
    "huge prompt": (config(num_virtual_tokens=10**9), "num_virtual_tokens in .* must be null"),
    "another library's module": (
        config(megatron_config={"a": 1}, megatron_core="os"),
        "megatron_config .* must be null",
    ),
    "a field of another type": (config(use_dora=7), "use_dora .* true or false, got 7"),
    "layers copied": (config(layer_replication=[[0, 10**9]]), "layer_replication .* must be null, got .*deeper model"),
    "dropout not a number": (config(lora_dropout=float("nan")), "lora_dropout .* finite number, got nan"),
    "an integer without end": (config(lora_alpha=10**400), "lora_alpha .* finite number"),
    "alpha of another type": (config(lora_alpha="4"), "lora_alpha .* finite number, got '4'"),
    "alpha not a number": (config(lora_alpha=float("nan")), "lora_alpha .* finite number, got nan"),
    "alpha infinite by pattern": (config(alpha_pattern={"x": float("inf")}), "alpha_pattern .* finite"),
    "more names than the file explains": (config(target_modules=["q"] * 2000), "at most 1024 names"),
    "no regular expression": (config(target_modules="("), "target_modules .* regular expression, got '\\('"),
    "no regular expression by pattern": (config(rank_pattern={"[": 2}), "rank_pattern .* regular expressions"),
    "no regular expression in its place": (config(rank_pattern={"(?i)x": 2}), "does not fit .*global flags"),
    "alpha beyond its dtype": (config(lora_alpha=1e300), "NaN or infinite outputs"),
    "alpha beyond the outputs": (config(lora_alpha=1e38), "NaN or infinite outputs"),
    "a field that is not known": (config(new_in_peft={"a": 1}), "new_in_peft .* must be null.*more than add LORA"),
    "pissa": (config(init_lora_weights="pissa"), "init_lora_weights .*path_initial_model_for_weight_conversion"),
    "pissa by iterations": (config(init_lora_weights="pissa_niter_4"), "init_lora_weights .*changed base"),
    "olora": (config(init_lora_weights="olora"), "init_lora_weights .*changed base"),
    "corda": (config(init_lora_weights="corda"), "init_lora_weights .*changed base"),
    "lora-ga": (config(init_lora_weights="lora_ga"), "init_lora_weights .*changed base"),
    "loftq": (config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4}), "init_lora_weights .*changed base"),
    "kasa": (config(kasa_config={"x": 1}), "kasa_config .* must be null.*rewrites the weights of the base"),
    "all biases": (config(bias="all"), "bias .* 'none': biases of the base"),
    "biases beside factors": (config(bias="lora_only"), "bias .* 'none': biases of the base"),
    "a copy of the router": (
        both(config(modules_to_save=["gate"]), with_tensor("layers.0.mlp.gate.weight", torch.ones(8, 32))),
        "trains the router of .*layers.0.mlp",
    ),
    "a copy of what the file does not hold": (config(modules_to_save=["mlp"]), "name .* values, and .* holds"),
    "a copy of everything": (config(modules_to_save=[""]), "name .* values, and .* holds"),
    "more tokens than the file holds": (config(trainable_token_indices=[0] * 1024), "name 32,768 values"),
    "a factor on the router": (
        config(target_parameters=[*EXPERT_PARAMETERS, "mlp.gate.weight"]),
        "trains the router of .*layers.0.mlp",
    ),
    "int64": (retyped(torch.int64), "has dtype I64"),
    "bool": (retyped(torch.bool), "has dtype BOOL"),
    "complex": (retyped(torch.complex64), "has dtype C64"),
    "float8": (retyped(torch.float8_e4m3fn), "has dtype F8_E4M3"),
    "float64 that overflows": (retyped(torch.float64, 1e300), "infinite values, or such as torch.float32 cannot hold"),
    "record of routers is no json": (hash_file("{"), "router_hash.json.* not valid JSON"),
    "record of routers is a list": (hash_file("[]"), "64 hexadecimal digits"),
    "record of routers is no hash": (hash_file('{"router_sha256": "0"}'), "64 hexadecimal digits"),
    "record of routers without end": (hash_file(" " * 2**21), "at most 1,048,576 are read"),
    "record of routers is a folder": (no_hash_file(lambda path: path.mkdir()), "is no file that can be read"),
    "record of routers is nowhere": (no_hash_file(lambda path: path.symlink_to("x")), "is no file that can be read"),
    "unknown method": (config(peft_type="EVIL"), "EVIL"),
    "no json": (lambda folder: (folder / CONFIG).write_text("{"), "not valid JSON"),
    "nested json": (lambda folder: (folder / CONFIG).write_text("[" * 10**5), "not valid JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "must be a mapping"),
    "large config": (lambda folder: (folder / CONFIG).write_text(" " * (5 * 2**20)), "at most"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
    "a pickle": (pickled, "is a pickle, which can run code"),
    "one byte cut off": (cut, "1 bytes are missing"),
    "git-lfs pointer": (
        lambda folder: (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "nan": (weights(set_nan), "NaN or infinite"),
    "missing tensor": (weights(lambda tensors, first: tensors.pop(first)), "lacks .* would be new weights"),
    "surplus tensor": (weights(lambda tensors, first: tensors.update({f"{first}.x": torch.ones(1)})), "no place for"),
    "a router of the base": (
        weights(
            lambda tensors, first: tensors.update(
                {"base_model.model.model.layers.0.mlp.gate.weight": torch.ones(8, 32)}
            )
        ),
        "mlp.gate.weight.* belongs to the base",
    ),
    "wrong shape": (
        weights(lambda tensors, first: tensors.update({first: tensors[first][:-1].clone()})),
        "does not fit",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_adapter_is_refused(case, saved):
    spoil, message = BROKEN[case]
    spoil(saved[0])
    base = qwen_model().train()
    with pytest.raises(AdapterError, match=message):
        load_adapter(base, saved[0])
    assert_as_before(base, qwen_model().train())


@pytest.mark.parametrize(
    "fields", [{"modules_to_save": ["gate"]}, {"modules_to_save": ["mlp"]}, {"target_parameters": ["mlp.gate.weight"]}]
)
def test_a_trained_router_is_refused(fields, tmp_path):
    get_peft_model(qwen_model(), lora(**fields)).save_pretrained(tmp_path)
    base = qwen_model()
    for documented in (AdapterError, RouterNotFrozenError):
        with pytest.raises(documented, match=r"trains the router of .*layers\.0\.mlp"):
            load_adapter(base, tmp_path)
    assert_as_before(base, qwen_model())


def test_a_refused_adapter_leaves_a_base_that_takes_the_next(saved, tmp_path):
    model = trained(get_peft_model(qwen_model(), lora()))
    model.save_pretrained(tmp_path / "wrong")
    weights(lambda tensors, first: tensors.pop(first))(tmp_path / "wrong")
    base = qwen_model()
    with pytest.raises(AdapterError, match="would be new weights"):
        load_adapter(base, tmp_path / "wrong")
    logits = load_adapter(base, saved[0])(input_ids=IDS).logits
    torch.testing.assert_close(logits, saved[1], rtol=1e-4, atol=1e-5)


def test_the_biases_of_a_base_stay(tmp_path):
    """A file with the bias of every router used to send all tokens of a GPT-OSS to expert 0."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_local_experts": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = GptOssForCausalLM(
        GptOssConfig(vocab_size=64, hidden_size=32, intermediate_size=32, head_dim=8, pad_token_id=0, **sizes)
    ).eval()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, lora())
    model.save_pretrained(tmp_path)
    base = model.unload()
    for bias in ("all", "lora_only", "none"):
        config(bias=bias)(tmp_path)
        chosen = torch.tensor([1000.0, 0, 0, 0])
        for layer in range(2):
            with_tensor(f"layers.{layer}.mlp.router.bias", chosen.clone())(tmp_path)
        with pytest.raises(AdapterError, match=r"biases of the base|belongs to the base"):
            load_adapter(base, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_a_second_adapter_joins_the_first(saved, tmp_path):
    model = trained(get_peft_model(qwen_model(), lora()))
    model.save_pretrained(tmp_path / "second")
    base = qwen_model()
    loaded = load_adapter(base, saved[0], "first")
    with pytest.raises(AdapterError, match="has an adapter already: pass the PeftModel"):
        load_adapter(base, tmp_path / "second")
    with pytest.raises(AdapterError, match="an adapter 'first' already: choose another"):
        load_adapter(loaded, tmp_path / "second", "first")
    weights(set_nan)(tmp_path / "second")
    first = loaded(input_ids=IDS).logits
    with pytest.raises(AdapterError, match="NaN or infinite values"):
        load_adapter(loaded, tmp_path / "second", "second")
    assert list(loaded.peft_config) == ["first"]
    assert torch.equal(loaded(input_ids=IDS).logits, first)
    model.save_pretrained(tmp_path / "second")
    both_there = load_adapter(loaded, tmp_path / "second", "second")
    torch.testing.assert_close(both_there(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    both_there.set_adapter("first")
    torch.testing.assert_close(both_there(input_ids=IDS).logits, first)


@pytest.mark.parametrize("put", [lambda path: None, lambda path: path.mkdir(), lambda path: path.symlink_to("x")])
def test_strict_needs_the_record_of_the_routers(put, saved):
    no_hash_file(put)(saved[0])
    with pytest.raises(AdapterError, match=r"has no router_hash\.json|is no file"):
        load_adapter(qwen_model(), saved[0], strict_router=True)


@pytest.mark.parametrize("name", ["a/b", "../..", "", "a.b", "x" * 65])
def test_a_name_that_is_no_name(name, saved):
    with pytest.raises(AdapterError, match="1 to 64 letters"):
        load_adapter(qwen_model(), saved[0], name)


def test_an_adapter_of_another_model(saved):
    with pytest.raises(AdapterError):
        load_adapter(hf_moe_model(hidden_size=16), saved[0])


def test_a_folder_has_no_revision(saved):
    with pytest.raises(AdapterError, match="is a folder, which has no revision 'v1'"):
        load_adapter(qwen_model(), saved[0], revision="v1")


def test_no_such_adapter(tmp_path):
    with pytest.raises(AdapterError, match=r"no folder here is called .*absent.*Check the path"):
        load_adapter(qwen_model(), tmp_path / "absent")


def test_the_folder_above_is_told_from_the_adapter(saved):
    with pytest.raises(AdapterError, match=r"such as .*adapter"):
        load_adapter(qwen_model(), saved[0].parent)


def test_offloading_is_named_as_the_cause(saved, tmp_path):
    qwen_model().save_pretrained(tmp_path / "model")
    here = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0")
    places = dict.fromkeys(here, "cpu") | {"model.layers.1": "disk"}
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    with pytest.raises(AdapterError, match=r"while 'model\.layers\.1' \(disk\) is offloaded: .* Load Qwen3Moe"):
        load_adapter(base, saved[0])
