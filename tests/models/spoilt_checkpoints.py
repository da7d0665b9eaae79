"""Small checkpoints, and the ways to spoil one: a table of what must be refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_moe.models.checkpoint_files import INDEX_FILE, SINGLE_FILE
from hf_moe.models.configuration_hf_moe import HfMoeConfig
from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM

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
