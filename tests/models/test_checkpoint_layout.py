"""Round trips of checkpoints bit for bit, and the refusal of everything that would load as another model.

The host loads the same damaged files without complaint: `test_the_host_alone_accepts` is the control.
"""

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, modeling_utils
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hf_moe.models.checkpoint_layout import (
    INDEX_FILE,
    SINGLE_FILE,
    CheckpointError,
    is_finite,
    register_conversion_mapping,
)
from hf_moe.models.configuration_hf_moe import HfMoeConfig
from hf_moe.models.modeling_hf_moe import (
    HfMoeForCausalLM,
    HfMoeForQuestionAnswering,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
)

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "first_k_dense_replace": 1,
}
HEADS = [
    HfMoeModel,
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeForQuestionAnswering,
]
UP = "model.layers.1.mlp.experts.2.up_proj.weight"
DOWN = "model.layers.2.mlp.experts.3.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"
ROUTER = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
EMBEDDINGS = "model.embed_tokens.weight"
SHARD_SIZE = "4KB"


def build(model_class: type = HfMoeForCausalLM, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = model_class(HfMoeConfig(**(SIZES | {"router_scoring": "sigmoid", "router_bias": True} | options))).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.uniform_(-1, 1)
    return model


def assert_same_tensors(actual: Any, expected: Any) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name


def stored(folder: Path) -> dict[str, Path]:
    """Every tensor name of a saved checkpoint, with its file."""
    names = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names |= dict.fromkeys(opened.keys(), file)
    return names


def edit(folder: Path, tensor: str, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Rewrite the file that holds `tensor`."""
    file = stored(folder)[tensor]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def edit_index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    change(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model saved in one file and in shards."""
    folder = tmp_path_factory.mktemp("saved")
    model = build()
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size=SHARD_SIZE)
    return {"single": folder / "single", "sharded": folder / "sharded"}


@pytest.fixture
def single(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["single"], tmp_path / "checkpoint"))


@pytest.fixture
def sharded(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["sharded"], tmp_path / "checkpoint"))


# Round trips


@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
@pytest.mark.parametrize("shard_size", ["1GB", SHARD_SIZE], ids=["one_file", "shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_is_bit_exact(tmp_path: Path, dtype: torch.dtype, shard_size: str, fused: bool) -> None:
    model = build().to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.data = buffer.data.float()
    model.save_pretrained(tmp_path, max_shard_size=shard_size, save_original_format=not fused)
    loaded, report = HfMoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert_same_tensors(loaded, model)
    assert not report["missing_keys"] | report["unexpected_keys"] | report["mismatched_keys"]
    names = stored(tmp_path)
    assert (UP in names) is not fused
    assert ("model.layers.1.mlp.experts.gate_up_proj" in names) is fused
    assert (len(set(names.values())) > 3) is (shard_size == SHARD_SIZE)


@pytest.mark.parametrize("model_class", HEADS)
def test_every_head_round_trips(tmp_path: Path, model_class: type) -> None:
    model = build(model_class, num_shared_experts=1)
    model.save_pretrained(tmp_path, max_shard_size=SHARD_SIZE)
    assert_same_tensors(model_class.from_pretrained(tmp_path), model)


@pytest.mark.parametrize(
    "options",
    [
        {"tie_word_embeddings": True},
        {"per_layer_config": {1: {"num_experts": 8}, 2: {"num_experts_per_tok": 1, "moe_intermediate_size": 4}}},
        {"num_null_experts": 2},
        {"attention_bias": True, "use_qk_norm": False},
    ],
    ids=["tied_embeddings", "experts_vary_by_layer", "null_experts", "attention_bias"],
)
def test_every_layout_round_trips(tmp_path: Path, options: dict[str, Any]) -> None:
    model = build(**options)
    model.save_pretrained(tmp_path, max_shard_size=SHARD_SIZE)
    loaded = HfMoeForCausalLM.from_pretrained(tmp_path)
    assert_same_tensors(loaded, model)
    tokens = torch.arange(8)[None]
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    if options.get("tie_word_embeddings"):
        assert "lm_head.weight" not in stored(tmp_path)
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_disk_holds_the_slices_of_the_fused_tensors(single: Path) -> None:
    experts = HfMoeForCausalLM.from_pretrained(single).model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj[2].chunk(2)
    tensors = load_file(single / SINGLE_FILE)
    assert torch.equal(tensors[UP], up)
    assert torch.equal(tensors[UP.replace("up_proj", "gate_proj")], gate)
    assert torch.equal(tensors[UP.replace("up_proj", "down_proj")], experts.down_proj[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_selection_bias_stays_float32(single: Path, dtype: torch.dtype) -> None:
    loaded = HfMoeForCausalLM.from_pretrained(single, dtype=dtype)
    bias = loaded.model.layers[1].mlp.gate.e_score_correction_bias
    assert loaded.dtype == dtype
    assert bias.dtype == torch.float32
    assert torch.equal(bias, load_file(single / SINGLE_FILE)[BIAS])


def test_registering_twice_changes_nothing() -> None:
    before = get_checkpoint_conversion_mapping("hf_moe")
    register_conversion_mapping()
    assert repr(get_checkpoint_conversion_mapping("hf_moe")) == repr(before)


# What other classes may lack or leave over


@pytest.mark.parametrize("model_class", HEADS[2:])
def test_a_new_head_is_initialised_and_reported(single: Path, model_class: type) -> None:
    model, report = model_class.from_pretrained(single, output_loading_info=True)
    assert report["missing_keys"]
    assert all(not name.startswith("model.") for name in report["missing_keys"])
    assert report["unexpected_keys"] == {"lm_head.weight"}
    assert all(is_finite(parameter) for parameter in model.parameters())


def test_the_base_model_loads_from_a_head_and_back(tmp_path: Path, single: Path) -> None:
    base = HfMoeModel.from_pretrained(single)
    assert_same_tensors(base, HfMoeForCausalLM.from_pretrained(single).model)
    base.save_pretrained(tmp_path / "base")
    assert_same_tensors(HfMoeForSequenceClassification.from_pretrained(tmp_path / "base").model, base)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing in .*model\.safetensors"):
        HfMoeForCausalLM.from_pretrained(tmp_path / "base")


def test_a_tied_head_needs_no_tensor(tmp_path: Path) -> None:
    build(HfMoeModel, tie_word_embeddings=True).save_pretrained(tmp_path)
    loaded = HfMoeForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_saved_head_must_be_there(tmp_path: Path) -> None:
    build(HfMoeForSequenceClassification).save_pretrained(tmp_path)
    edit(tmp_path, "score.weight", lambda tensors: tensors.pop("score.weight"))
    with pytest.raises(CheckpointError, match=r"score\.weight is missing in .*model\.safetensors"):
        HfMoeForSequenceClassification.from_pretrained(tmp_path)


def test_ignore_mismatched_sizes_holds_for_heads_alone(tmp_path: Path) -> None:
    build(HfMoeForSequenceClassification, num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"score\.weight in .* has shape \[2, 16\], not \[5, 16\]"):
        HfMoeForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    model = HfMoeForSequenceClassification.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model.score.weight.shape == (5, 16)
    with pytest.raises(CheckpointError, match=r"gate\.weight in .* has shape \[4, 16\], not \[8, 16\]"):
        HfMoeForSequenceClassification.from_pretrained(tmp_path, num_experts=8, ignore_mismatched_sizes=True)


# The reject list


class Case(NamedTuple):
    """A way to spoil a checkpoint, and what the error must name."""

    spoil: Callable[[Path], Any]
    names: tuple[str, ...]
    layout: str = "single"
    loading: dict[str, Any] = {}  # noqa: RUF012 (never changed)


def change(tensor: str, function: Callable[[Tensor], Tensor]) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        edit(folder, tensor, lambda tensors: tensors.update({tensor: function(tensors[tensor]).contiguous()}))

    return spoil


def drop(*tensors: str) -> Callable[[Path], Any]:
    """Remove tensors from their files, and from the index if there is one."""

    def spoil(folder: Path) -> None:
        for tensor in tensors:
            edit(folder, tensor, lambda held, tensor=tensor: held.pop(tensor))
            if (folder / INDEX_FILE).exists():
                edit_index(folder, lambda index, tensor=tensor: index["weight_map"].pop(tensor))

    return spoil


def add(tensor: str, value: Tensor, beside: str = NORM) -> Callable[[Path], Any]:
    return lambda folder: edit(folder, beside, lambda tensors: tensors.update({tensor: value}))


def set_element(value: float) -> Callable[[Tensor], Tensor]:
    def function(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return function


def rewrite(tensor: str, function: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Change the bytes of the file that holds `tensor`."""

    def spoil(folder: Path) -> None:
        file = stored(folder)[tensor]
        file.write_bytes(function(file.read_bytes()))

    return spoil


def rename_in_index(file: Any) -> Callable[[Path], Any]:
    return lambda folder: edit_index(folder, lambda index: index["weight_map"].update({UP: file}))


def move_outside(folder: Path) -> None:
    """A whole checkpoint whose index reaches a file beside the folder."""
    inside = stored(folder)[UP]
    shutil.move(inside, folder.parent / "outside.safetensors")

    def point(index: dict[str, Any]) -> None:
        weight_map = index["weight_map"]
        weight_map.update({name: "../outside.safetensors" for name, file in weight_map.items() if file == inside.name})

    edit_index(folder, point)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE_FILE), folder / "pytorch_model.bin")
    (folder / SINGLE_FILE).unlink()


def copy_into_second_shard(folder: Path) -> None:
    names = stored(folder)
    second = next(name for name, file in names.items() if file != names[UP])
    value = load_file(names[UP])[UP]
    edit(folder, second, lambda tensors: tensors.update({UP: value}))


def swap_shards(folder: Path) -> None:
    first, second = sorted(set(stored(folder).values()))[:2]
    first.rename(folder / "third")
    second.rename(first)
    (folder / "third").rename(second)


def fuse_too(folder: Path) -> None:
    model = HfMoeForCausalLM.from_pretrained(folder)
    fused = "model.layers.1.mlp.experts.down_proj"
    add(fused, model.get_parameter(fused).detach().clone())(folder)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
SINGLE = r"checkpoint/model\.safetensors"
SHARD = r"checkpoint/model-\d{5}-of-\d{5}\.safetensors"
INDEX = r"checkpoint/model\.safetensors\.index\.json"
to_int = torch.Tensor.long

CASES = {
    # files
    "one byte cut off": Case(
        rewrite(DOWN, lambda data: data[:-1]), (SHARD, "1 bytes are missing", "weight"), "sharded"
    ),
    "half a single file": Case(
        rewrite(DOWN, lambda data: data[: len(data) // 2]), (SINGLE, "bytes are missing", "from")
    ),
    "header cut off": Case(rewrite(UP, lambda data: data[:100]), (SHARD, "header is cut off"), "sharded"),
    "seven bytes": Case(rewrite(UP, lambda data: data[:7]), (SHARD, "header is cut off"), "sharded"),
    "one byte added": Case(rewrite(UP, lambda data: data + b"\0"), (SHARD, "1 bytes too many"), "sharded"),
    "empty file": Case(rewrite(UP, lambda data: b""), (SHARD, "is empty"), "sharded"),
    "git-lfs pointer": Case(rewrite(UP, lambda data: LFS_POINTER), (SHARD, "git lfs pull"), "sharded"),
    "header length 2^63": Case(rewrite(UP, lambda data: b"\xff" * 7 + b"\x7f" + data[8:]), (SINGLE, "header")),
    "header not json": Case(rewrite(UP, lambda data: data[:8] + b"}" * 40 + data[48:]), (SINGLE, "header is damaged")),
    "header nested": Case(
        rewrite(UP, lambda data: (10**5).to_bytes(8, "little") + b"[" * 10**5), (SINGLE, "header is damaged")
    ),
    "missing shard": Case(lambda folder: stored(folder)[UP].unlink(), (SHARD, "is missing"), "sharded"),
    "pickle only": Case(pickled, ("checkpoint", r"pytorch_model\.bin", "safetensors only")),
    "pickle wanted": Case(pickled, ("use_safetensors=False",), loading={"use_safetensors": False}),
    "two models in a folder": Case(
        lambda folder: save_file({NORM: torch.ones(16)}, folder / SINGLE_FILE), (SINGLE_FILE, INDEX_FILE), "sharded"
    ),
    # index
    "index outside": Case(move_outside, (r"\.\./outside\.safetensors", "checkpoint"), "sharded"),
    "index absolute": Case(rename_in_index("/etc/passwd"), ("/etc/passwd",), "sharded"),
    "index subfolder": Case(rename_in_index("a/b.safetensors"), ("a/b",), "sharded"),
    "index hidden": Case(rename_in_index(".b.safetensors"), (r"\.b\.safetensors",), "sharded"),
    "index number": Case(rename_in_index(3), ("3", "checkpoint"), "sharded"),
    "index not json": Case(lambda folder: (folder / INDEX_FILE).write_text("{"), (INDEX, "not valid JSON"), "sharded"),
    "index nested": Case(
        lambda folder: (folder / INDEX_FILE).write_text("[" * 100_000), (INDEX, "not valid JSON"), "sharded"
    ),
    "index a list": Case(lambda folder: (folder / INDEX_FILE).write_text("[]"), (INDEX, "weight_map"), "sharded"),
    "index without metadata": Case(
        lambda folder: edit_index(folder, lambda index: index.pop("metadata")), (INDEX, "metadata"), "sharded"
    ),
    "index empty": Case(
        lambda folder: edit_index(folder, lambda index: index["weight_map"].clear()), (INDEX, "weight_map"), "sharded"
    ),
    "index lists an absent tensor": Case(
        lambda folder: edit(folder, UP, lambda tensors: tensors.pop(UP)), (UP, SHARD, "the index says"), "sharded"
    ),
    "index lacks a tensor": Case(
        lambda folder: edit_index(folder, lambda index: index["weight_map"].pop(UP)), (UP, SHARD), "sharded"
    ),
    "shards swapped": Case(swap_shards, (SHARD, "the index says"), "sharded"),
    "tensor in two shards": Case(copy_into_second_shard, (UP, SHARD, "also in"), "sharded"),
    # tensors
    "wrong shape, expert": Case(change(UP, lambda x: x[:, :-1]), (UP, SINGLE, r"\[8, 15\], not \[8, 16\]")),
    "transposed expert": Case(change(DOWN, torch.t), (DOWN, SHARD, r"\[8, 16\], not \[16, 8\]"), "sharded"),
    "wrong shape, attention": Case(change(QUERY, lambda x: x[:-1]), (QUERY, SINGLE)),
    "wrong shape, router": Case(change(ROUTER, lambda x: x[:-1]), (ROUTER, SINGLE)),
    "wrong shape, embeddings": Case(change(EMBEDDINGS, lambda x: x[:-1]), (EMBEDDINGS, SINGLE)),
    "wrong shape, any head": Case(
        change(UP, lambda x: x[:-1]), (UP, SINGLE), loading={"ignore_mismatched_sizes": True}
    ),
    "nan, expert": Case(change(UP, set_element(float("nan"))), (UP, SHARD, "NaN"), "sharded"),
    "nan, expert in bfloat16": Case(
        change(UP, set_element(float("nan"))), (UP, SINGLE, "NaN"), loading={"dtype": torch.bfloat16}
    ),
    "inf, expert": Case(change(DOWN, set_element(float("inf"))), (DOWN, SINGLE, "infinite")),
    "-inf, router": Case(change(ROUTER, set_element(-float("inf"))), (ROUTER, SINGLE, "infinite")),
    "nan, norm": Case(change(NORM, set_element(float("nan"))), (NORM, SINGLE)),
    "nan, embeddings": Case(change(EMBEDDINGS, set_element(float("nan"))), (EMBEDDINGS, SINGLE)),
    "nan, selection bias": Case(change(BIAS, set_element(float("nan"))), (BIAS, SINGLE)),
    "nan, head": Case(change("lm_head.weight", set_element(float("nan"))), (r"lm_head\.weight", SINGLE)),
    "too large for float16": Case(
        change(UP, set_element(1e5)), (UP, SINGLE, "float16", "100000"), loading={"dtype": torch.float16}
    ),
    "int64, expert": Case(change(UP, to_int), (UP, SINGLE, "I64")),
    "int64, all experts": Case(
        lambda folder: [change(name, to_int)(folder) for name in stored(folder) if ".experts." in name],
        ("experts", SINGLE, "I64"),
    ),
    "int8, norm": Case(change(NORM, torch.Tensor.char), (NORM, SINGLE, "I8")),
    "bool, router": Case(change(ROUTER, torch.Tensor.bool), (ROUTER, SINGLE, "BOOL")),
    "float8 without scales": Case(change(UP, lambda x: x.to(torch.float8_e4m3fn)), (UP, SINGLE, "F8_E4M3")),
    "missing, one projection": Case(drop(UP), (UP, SINGLE, "is missing")),
    "missing, one projection of a shard": Case(drop(UP), (UP, SHARD, "is missing"), "sharded"),
    "missing, one expert": Case(
        drop(DOWN, DOWN.replace("down", "up"), DOWN.replace("down", "gate")), (DOWN, SINGLE, "is missing")
    ),
    "missing, all experts of a layer": Case(
        lambda folder: drop(*(name for name in stored(folder) if "layers.1.mlp.experts" in name))(folder),
        (r"model\.layers\.1\.mlp\.experts\.0\.gate_proj\.weight", "and 7 more", SINGLE),
    ),
    "missing, attention": Case(drop(QUERY), (QUERY, SHARD), "sharded"),
    "missing, norm": Case(drop(NORM), (NORM, SINGLE)),
    "missing, router": Case(drop(ROUTER), (ROUTER, SINGLE)),
    "missing, selection bias": Case(drop(BIAS), (BIAS, SINGLE)),
    "missing, embeddings": Case(drop(EMBEDDINGS), (EMBEDDINGS, SINGLE)),
    "missing, untied head": Case(drop("lm_head.weight"), (r"lm_head\.weight", SINGLE)),
    "one expert too many": Case(
        add("model.layers.1.mlp.experts.4.up_proj.weight", torch.ones(8, 16)),
        (r"experts\.4\.up_proj", SINGLE, "no place"),
    ),
    "same expert twice": Case(
        add("layers.1.mlp.experts.2.up_proj.weight", torch.ones(8, 16)), (UP, SINGLE, r"layers\.1\.mlp")
    ),
    "fused and per expert": Case(fuse_too, (r"experts\.down_proj", SINGLE, "once more")),
    "unknown base tensor": Case(
        add("model.layers.0.mlp.extra.weight", torch.ones(2)), (r"mlp\.extra\.weight", SINGLE, "no place")
    ),
    # config
    "config with fewer experts": Case(
        lambda folder: edit_config(folder, num_experts=3), (r"experts\.3\.", SINGLE, "config.json")
    ),
    "config with more experts": Case(
        lambda folder: edit_config(folder, num_experts=5), (r"experts\.4\.", SINGLE, "config.json")
    ),
    "config with fewer layers": Case(
        lambda folder: edit_config(folder, num_hidden_layers=2), (r"layers\.2\.", SINGLE, "no place")
    ),
    "config with more layers": Case(
        lambda folder: edit_config(folder, num_hidden_layers=4), (r"layers\.3\.", SINGLE, "is missing")
    ),
    "config without selection bias": Case(
        lambda folder: edit_config(folder, router_bias=False), (BIAS, SINGLE, "no place")
    ),
    "config with a shared expert": Case(
        lambda folder: edit_config(folder, num_shared_experts=1), ("shared_experts", SINGLE, "is missing")
    ),
    "config with dense layers": Case(
        lambda folder: edit_config(folder, first_k_dense_replace=2), (r"layers\.1\.mlp", SINGLE)
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_spoilt_checkpoint_is_refused(case: Case, saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved[case.layout], tmp_path / "checkpoint"))
    case.spoil(folder)
    with pytest.raises(CheckpointError) as refusal:
        HfMoeForCausalLM.from_pretrained(folder, **case.loading)
    for name in case.names:
        refusal.match(name)


SILENT = ("nan, expert", "nan, norm", "int64, all experts", "missing, norm", "missing, router", "index outside")


@pytest.mark.parametrize("name", SILENT)
def test_the_host_alone_accepts(name: str, tmp_path: Path) -> None:
    """The control: the checks above are not the host's."""
    config = {key: value for key, value in SIZES.items() if key != "first_k_dense_replace"}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**config, mlp_only_layers=[0], head_dim=8))
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder, max_shard_size="1GB" if CASES[name].layout == "single" else SHARD_SIZE)
    CASES[name].spoil(folder)
    assert Qwen3MoeForCausalLM.from_pretrained(folder) is not None


# Ways to load


@pytest.mark.parametrize("fused", [False, True], ids=["per_expert", "fused"])
def test_state_dict(fused: bool, single: Path) -> None:
    model = HfMoeForCausalLM.from_pretrained(single)
    tensors = dict(model.state_dict()) if fused else load_file(single / SINGLE_FILE)
    loaded = HfMoeForCausalLM.from_pretrained(None, config=model.config, state_dict=dict(tensors))
    assert_same_tensors(loaded, model)
    with pytest.raises(CheckpointError, match=rf"{NORM} is missing in the state_dict"):
        HfMoeForCausalLM.from_pretrained(
            None, config=model.config, state_dict={key: value for key, value in tensors.items() if key != NORM}
        )
    with pytest.raises(CheckpointError, match=rf"{ROUTER} in the state_dict has NaN"):
        HfMoeForCausalLM.from_pretrained(
            None, config=model.config, state_dict=tensors | {ROUTER: set_element(float("nan"))(tensors[ROUTER])}
        )


def hub_cache(folder: Path, cache: Path, subfolder: str = "", revision: str = "main") -> Path:
    """The files of `folder` as the Hub client caches them: links in a snapshot to blobs."""
    repository, commit = cache / "models--owner--name", "0123456789" * 4
    snapshot = repository / "snapshots" / commit / subfolder
    for path in (snapshot, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    for number, file in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / str(number)
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_hub_repositories(layout: str, saved: dict[str, Path], tmp_path: Path) -> None:
    where = {"subfolder": "inner", "revision": "v1"}
    hub_cache(saved[layout], tmp_path / "good", **where)
    loaded = HfMoeForCausalLM.from_pretrained("owner/name", cache_dir=tmp_path / "good", **where)
    assert_same_tensors(loaded, HfMoeForCausalLM.from_pretrained(saved[layout]))
    spoilt = Path(shutil.copytree(saved[layout], tmp_path / "spoilt"))
    change(UP, set_element(float("nan")))(spoilt)
    hub_cache(spoilt, tmp_path / "bad", **where)
    with pytest.raises(CheckpointError, match=rf"{UP} in .*/inner/model.*safetensors has NaN"):
        HfMoeForCausalLM.from_pretrained("owner/name", cache_dir=tmp_path / "bad", **where)


@pytest.mark.parametrize("content", ["{", '{"metadata": {}, "weight_map": {"a": "../a.safetensors"}}'])
def test_hub_index(content: str, sharded: Path, tmp_path: Path) -> None:
    (sharded / INDEX_FILE).write_text(content)
    snapshot = hub_cache(sharded, tmp_path / "cache")
    shutil.copyfile(stored(sharded)[UP], snapshot.parent / "a.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json|a\.safetensors"):
        HfMoeForCausalLM.from_pretrained("owner/name", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("layout", ["1GB", SHARD_SIZE])
def test_variant(layout: str, tmp_path: Path) -> None:
    model, other = build(), build(seed=1)
    # in this order: a plain save removes the shards of every variant (the host does)
    other.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size=layout, variant="ema")
    assert_same_tensors(HfMoeForCausalLM.from_pretrained(tmp_path, variant="ema"), model)
    assert_same_tensors(HfMoeForCausalLM.from_pretrained(tmp_path), other)


DEVICE_MAPS = {
    "cpu": {"": "cpu"},
    "disk": {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    | {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"},
}


@pytest.mark.parametrize("device_map", DEVICE_MAPS.values(), ids=DEVICE_MAPS.keys())
def test_device_map(device_map: dict[str, str], sharded: Path, tmp_path: Path) -> None:
    tokens = torch.arange(8)[None]
    expected = HfMoeForCausalLM.from_pretrained(sharded)(tokens).logits
    options = {"device_map": device_map, "offload_folder": tmp_path / "offload", "experts_implementation": "eager"}
    loaded = HfMoeForCausalLM.from_pretrained(sharded, **options)
    torch.testing.assert_close(loaded(tokens).logits, expected)
    if "disk" in device_map.values():
        with pytest.raises(CheckpointError, match="Save into another folder"):
            loaded.save_pretrained(sharded)
    loaded.save_pretrained(tmp_path / "again")
    assert_same_tensors(
        HfMoeForCausalLM.from_pretrained(tmp_path / "again"), HfMoeForCausalLM.from_pretrained(sharded)
    )
    change(DOWN, set_element(float("nan")))(sharded)
    with pytest.raises(CheckpointError, match=rf"{DOWN} in .*model-\d+-of-\d+\.safetensors has NaN"):
        HfMoeForCausalLM.from_pretrained(sharded, **options)


def test_key_mapping(single: Path) -> None:
    expected = HfMoeForCausalLM.from_pretrained(single)
    tensors = load_file(single / SINGLE_FILE)
    save_file({name.replace("self_attn", "attention"): value for name, value in tensors.items()}, single / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=rf"{QUERY} is missing"):
        HfMoeForCausalLM.from_pretrained(single)
    assert_same_tensors(
        HfMoeForCausalLM.from_pretrained(single, key_mapping={r"\.attention\.": ".self_attn."}), expected
    )


def test_adapter_folder_loads_its_base(single: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(HfMoeForCausalLM.from_pretrained(single), peft.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    loaded = HfMoeForCausalLM.from_pretrained(tmp_path / "adapter")
    tokens = torch.arange(8)[None]
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    drop(NORM)(single)
    with pytest.raises(CheckpointError, match=rf"{NORM} is missing"):
        HfMoeForCausalLM.from_pretrained(tmp_path / "adapter")


def test_loading_info_is_the_hosts(single: Path) -> None:
    model = HfMoeForCausalLM.from_pretrained(single)
    assert isinstance(model, HfMoeForCausalLM)
    model, report = HfMoeForCausalLM.from_pretrained(single, output_loading_info=True)
    assert set(report) == {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_is_finite_sees_one_element(dtype: torch.dtype, value: float) -> None:
    tensor = torch.full((3, 1000), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(tensor)
    for position in (0, 1234, 2999):
        spoilt = tensor.clone()
        spoilt.view(-1)[position] = value
        assert not is_finite(spoilt)
    assert is_finite(tensor[:0])


# A save that is cut off


FINISHED = 7


def save_and_die(model: Any, folder: Path, shard_size: str, step: int) -> bool:
    """Save in another process that dies before its change number `step` to a file; whether it lived to the end."""
    child = os.fork()
    if child == 0:
        steps = itertools.count()
        write = modeling_utils.safe_save_file

        def count() -> None:
            if next(steps) == step:
                os._exit(0)

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wxa+")
            if (writes or event in ("os.remove", "os.rename")) and str(arguments[0]).startswith(str(folder)):
                count()

        modeling_utils.safe_save_file = lambda *args, **kwargs: (count(), write(*args, **kwargs))
        sys.addaudithook(watch)
        try:
            model.save_pretrained(folder, max_shard_size=shard_size)
        finally:
            os._exit(FINISHED)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == FINISHED


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.parametrize("new_size", ["1GB", "8KB"], ids=["to_one_file", "to_shards"])
@pytest.mark.parametrize("old_size", [None, "1GB", "8KB"], ids=["nothing", "one_file", "shards"])
def test_a_killed_save_is_never_another_model(old_size: str | None, new_size: str, tmp_path: Path) -> None:
    """Same shapes, other values and another config: only the rules on files tell the two models apart."""
    old, new = build(), build(seed=1, num_experts_per_tok=1)
    refused = 0
    for step in itertools.count():
        folder = tmp_path / str(step)
        if old_size is not None:
            old.save_pretrained(folder, max_shard_size=old_size)
        finished = save_and_die(new, folder, new_size, step)
        try:
            loaded = HfMoeForCausalLM.from_pretrained(folder)
        except (CheckpointError, OSError):
            refused += 1
        else:
            assert_same_tensors(loaded, new if loaded.config.num_experts_per_tok == 1 else old)
        if finished:
            break
    assert refused > 2
    assert_same_tensors(HfMoeForCausalLM.from_pretrained(folder), new)
    assert not list(folder.glob("*.superseded"))


def test_an_unfinished_save_names_the_model_that_was_there(tmp_path: Path) -> None:
    model = build()
    model.save_pretrained(tmp_path)
    assert not save_and_die(build(seed=1), tmp_path, "1GB", 2)
    with pytest.raises(CheckpointError, match=r"unfinished save.*model\.safetensors\.superseded"):
        HfMoeForCausalLM.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert_same_tensors(HfMoeForCausalLM.from_pretrained(tmp_path), model)


def test_a_save_that_the_host_refuses_costs_nothing(single: Path) -> None:
    model = HfMoeForCausalLM.from_pretrained(single)
    model.generation_config.temperature = -1.0
    with pytest.raises(ValueError, match="temperature"):
        model.save_pretrained(single)
    assert_same_tensors(HfMoeForCausalLM.from_pretrained(single), model)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_every_cut_and_every_lost_file_is_refused(layout: str, saved: dict[str, Path], tmp_path: Path) -> None:
    """At the start, the end and both sides of every tensor of one file; and each weight file gone."""
    folder = Path(shutil.copytree(saved[layout], tmp_path / "checkpoint"))
    file = stored(folder)[UP]
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    bounds = {
        start + offset for name, entry in header.items() if name != "__metadata__" for offset in entry["data_offsets"]
    }
    for cut in sorted({0, 4, 8, start - 1} | {bound + step for bound in bounds for step in (-1, 0, 1)}):
        if cut == len(data):
            continue
        file.write_bytes((data + b"\0")[:cut])
        with pytest.raises(CheckpointError, match=file.name):
            HfMoeForCausalLM.from_pretrained(folder)
    file.write_bytes(data)
    for lost in [*folder.glob("*.safetensors*"), folder / "config.json"]:
        content = lost.read_bytes()
        lost.unlink()
        with pytest.raises((CheckpointError, OSError, ValueError)):
            HfMoeForCausalLM.from_pretrained(folder)
        lost.write_bytes(content)
    assert HfMoeForCausalLM.from_pretrained(folder) is not None
