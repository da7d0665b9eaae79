"""A folder that would not give the model that was saved is found out before it is pushed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_moe import expert_lora_config
from hf_moe.adapters.frozen_router import save_router_hash
from hf_moe.hub import load_check
from hf_moe.hub.errors import LoadsBackError, PushRefusedError
from hf_moe.hub.load_check import check_loads
from tiny_models import build_tiny

from .conftest import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*(meta parameter|missing adapter keys|is_gradient_check)")


@pytest.fixture(scope="module")
def native(tmp_path_factory) -> Path:
    """`base`, and `adapter` with expert LoRA on it and the record of its routers."""
    folder = tmp_path_factory.mktemp("native")
    build_tiny("olmoe")[0].save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, expert_lora_config(base, r=2))
    model.save_pretrained(folder / "adapter")
    save_router_hash(folder / "adapter", model)
    return folder


def spoil(source: Path, target: Path, change, name: str = "model.safetensors") -> Path:
    """A copy whose tensors are changed in place by `change`."""
    shutil.copytree(source, target)
    tensors = load_file(target / name)
    change(tensors)
    save_file(tensors, target / name, metadata={"format": "pt"})
    return target


def drop(part: str):
    def change(tensors):
        del tensors[next(name for name in tensors if part in name)]

    return change


def poison(part: str):
    def change(tensors):
        tensors[next(name for name in tensors if part in name)].fill_(float("nan"))

    return change


def integers(part: str):
    def change(tensors):
        name = next(name for name in tensors if part in name)
        tensors[name] = tensors[name].long()

    return change


def test_whole_ones_load(native, tmp_path):
    save_tiny(tmp_path / "ours")
    summary = "loads as HfMoeForCausalLM, a forward pass is finite, decoding with a cache is right"
    assert check_loads(tmp_path / "ours").summary == summary
    assert check_loads(native / "base").ran
    assert "routers as in router_hash.json" in check_loads(native / "adapter", native / "base").summary


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("self_attn.q_proj"), "does not load back: missing keys: .*q_proj"),
        (integers("experts.1.up_proj"), "experts.1.up_proj.weight in .* has dtype I64"),
        (poison("lm_head"), "lm_head.weight in .* holds NaN or infinity"),
        (poison("experts.7.down_proj"), "experts.down_proj in .* holds NaN or infinity"),
        (lambda tensors: [tensors[name].fill_(1e38) for name in ("model.norm.weight", "lm_head.weight")], "in logits"),
    ],
    ids=["missing", "integers", "nan", "nan in one expert", "overflow"],
)
def test_weights_of_a_native_model(change, words, native, tmp_path):
    with pytest.raises(LoadsBackError, match=words):
        check_loads(spoil(native / "base", tmp_path / "spoilt", change))


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("model.safetensors", lambda data: data[:-1], "model.safetensors is not a whole .* 1 bytes are missing"),
        ("model.safetensors", lambda data: LFS_POINTER, "Git-LFS pointer"),
        ("model.safetensors", lambda data: b"", "model.safetensors is empty"),
        ("generation_config.json", lambda data: data[:-3], "generation_config.json' is not valid JSON"),
    ],
    ids=["cut", "pointer", "empty", "json"],
)
def test_files_of_a_native_model(name, change, words, native, tmp_path):
    """transformers names no file in these errors, or overlooks them."""
    folder = shutil.copytree(native / "base", tmp_path / "base")
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(PushRefusedError, match=words):
        check_loads(folder)


def test_an_index_of_another_save(native, tmp_path):
    AutoModelForCausalLM.from_pretrained(native / "base").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["gone"] = next(iter(index["weight_map"].values()))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LoadsBackError, match=r"gone is missing in .*where the index says it is"):
        check_loads(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("lora_B"), "lacks .*lora_B.*new weights"),
        (lambda tensors: tensors.update({"base_model.model.extra": torch.ones(1)}), "holds .*extra.*no place for"),
        (poison("lora_A"), "NaN or infinite"),
    ],
    ids=["missing", "extra", "nan"],
)
def test_weights_of_an_adapter(change, words, native, tmp_path):
    """PEFT loads the first two with a warning at most."""
    spoilt = spoil(native / "adapter", tmp_path / "spoilt", change, "adapter_model.safetensors")
    with pytest.raises(LoadsBackError, match=words):
        check_loads(spoilt, native / "base")


def test_an_adapter_of_another_base(native, tmp_path):
    other = spoil(native / "base", tmp_path / "other", lambda tensors: [t.mul_(2) for t in tensors.values()])
    with pytest.raises(LoadsBackError, match="the routers differ from those that"):
        check_loads(native / "adapter", other)


def test_a_record_in_another_dtype_is_compared_in_that_dtype(native, tmp_path):
    """Trained in float32 on a base that is stored in bfloat16."""
    base = AutoModelForCausalLM.from_pretrained(native / "base", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    shutil.copytree(native / "adapter", tmp_path / "adapter")
    save_router_hash(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32"))
    assert check_loads(tmp_path / "adapter", tmp_path / "base").ran


def test_without_the_memory_names_and_shapes_are_compared(native, monkeypatch, tmp_path):
    monkeypatch.setattr(load_check, "_fits", lambda folder: False)
    found = check_loads(native / "base")
    assert not found.ran
    assert "by names and shapes" in found.summary
    assert not check_loads(native / "adapter", native / "base").ran
    with pytest.raises(LoadsBackError, match="missing keys"):
        check_loads(spoil(native / "base", tmp_path / "spoilt", drop("self_attn.q_proj")))
    spoilt = spoil(native / "adapter", tmp_path / "adapter", drop("lora_B"), "adapter_model.safetensors")
    with pytest.raises(LoadsBackError, match=r"lacks .*lora_B"):
        check_loads(spoilt, native / "base")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["NoSuchModel"]}, "'NoSuchModel', which no Auto class knows for 'olmoe'"),
        ({"architectures": None}, "says None, which no Auto class knows"),
        ({"model_type": "no_such_type"}, "does not load back"),
        ({"hidden_size": 999}, "does not load back"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(change, words, native, tmp_path):
    folder = shutil.copytree(native / "base", tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(LoadsBackError, match=words):
        check_loads(folder)


def test_weights_without_a_place_are_named(native, tmp_path):
    spoilt = spoil(native / "base", tmp_path / "base", lambda tensors: tensors.update(extra=torch.ones(1)))
    assert "without extra (1 tensors in all), which it has no place for" in check_loads(spoilt).summary


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_cut_off(name, tmp_path):
    save_tiny(tmp_path)
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    assert check_loads(tmp_path).ran
    file = tmp_path / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(PushRefusedError, match=f"{name}' is not valid JSON"):
        check_loads(tmp_path)
    data = json.loads(whole)
    file.write_text(json.dumps(data | {"version": "9.9", "model": {}, "added_tokens": None}))
    if name == "tokenizer.json":
        with pytest.raises(LoadsBackError, match="does not load back"):
            check_loads(tmp_path)


def test_code_is_not_run_unless_it_is_trusted(tmp_path):
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "theirs", "auto_map": {"AutoConfig": "c.C"}}))
    (folder / "c.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(LoadsBackError, match="trust_remote_code"):
        check_loads(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_forgets_what_it_decoded_is_found(native, dtype, tmp_path, monkeypatch):
    """Its forwards are finite, and its tokens wrong: code that swallows the name of the cache under another one."""
    model = AutoModelForCausalLM.from_pretrained(native / "base", dtype=dtype)
    model.save_pretrained(tmp_path)
    assert "decoding with a cache is right" in check_loads(tmp_path).summary
    forward = type(model).forward

    def forgetful(self, *args, past_key_values=None, cache=None, **kwargs):
        kwargs.pop("position_ids", None)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", forgetful)
    with pytest.raises(LoadsBackError, match="decodes wrongly: with its cache"):
        check_loads(tmp_path)
