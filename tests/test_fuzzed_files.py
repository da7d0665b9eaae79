"""Files from elsewhere, damaged at random: each is refused with the documented error, or read without harm.

The mutations are the same in every run; the longer forms (`pytest -m long tests/test_fuzzed_files.py`) draw more.
"""

import copy
import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hf_moe.adapters.frozen_router import HASH_FILE, save_router_hash
from hf_moe.adapters.load_adapter import CONFIG, WEIGHTS, AdapterError, load_adapter
from hf_moe.observability.layer_statistics import LayerStatistics, empty_statistics
from hf_moe.observability.routing_trace import RoutingTrace
from hf_moe.observability.trace_files import MANIFEST as TRACE
from hf_moe.observability.trace_files import STATISTICS
from hf_moe.training.checkpointing.checkpoints import MANIFEST, flaw, newest_sealed, seal
from tiny_moe import EXPERT_PARAMETERS, qwen_model

IDS = torch.arange(12).view(2, 6)
MOST_MEMORY = 512 * 2**20
pytestmark = pytest.mark.filterwarnings("ignore")
longer = pytest.param(range(60, 1000), marks=[pytest.mark.long, pytest.mark.timeout(1800)])
rounds = pytest.mark.parametrize("seeds", [range(60), longer], ids=len)

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-320, 1e38, 1e300),
    *(float("nan"), float("inf"), "", "x", "none", "all", "lora_only", "pissa", "olora", "gaussian", "eva", "(", "[a"),
    *("gate", "mlp", "mlp.gate.weight", "lm_head", "all-linear", ".*", "CAUSAL_LM", "LORA", "IA3", "XLORA", "a\0b"),
    *("\ud800", "\u202e", "../../x", "x" * 10**5, [], [[]], ["gate"], ["lm_head"], [""], [0, 1, 10**9], [None]),
    *({}, {"x": 1}, {"(": 2}, {".*": 2}, {"x": [1]}, {"lm_head": [0]}, [0] * 5000, ["q_proj"] * 5000),
]
FIELDS = [
    *("peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "target_modules"),
    *("exclude_modules", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern", "use_dora"),
    *("use_rslora", "lora_bias", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "trainable_token_indices"),
    *("layer_replication", "megatron_config", "loftq_config", "eva_config", "corda_config", "kasa_config"),
    *("arrow_config", "alora_invocation_tokens", "ensure_weight_tying", "auto_mapping", "use_qalora", "unheard_of"),
    *("runtime_config", "inference_mode", "base_model_name_or_path", "revision", "peft_version"),
]
BASE_NAMES = (
    "base_model.model.model.layers.0.mlp.gate.weight",
    "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
    "base_model.model.model.layers.1.self_attn.q_proj.weight",
    "base_model.model.model.embed_tokens.weight",
    "model.norm.weight",
)
DTYPES = (torch.int64, torch.bool, torch.complex64, torch.float64, torch.float16, torch.float8_e4m3fn, torch.uint8)
NESTED = b"[" * 2000


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Cut, flipped, doubled or with something put in."""
    at, length = rng.randrange(len(data)), rng.choice((1, 8, 64))
    again, noise = data[at : at + length] * 2, rng.randbytes(length)
    other = rng.choice((b"", b"\0", b"\xff" * 8, NESTED, b"{}", again, noise))
    return rng.choice((data[:at], data[:at] + other + data[at + length :], data[:at] + other + data[at:], other))


def changed(value: Any, rng: random.Random) -> Any:
    """The JSON value with a part of it replaced, left out, doubled or put in."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.2:
        return copy.deepcopy(rng.choice(VALUES))
    value = copy.deepcopy(value)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.2:
        del value[key]
    elif rng.random() < 0.1 and isinstance(value, list):
        value.append(value[key])
    else:
        value[key] = changed(value[key], rng)
    return value


def write_changed_json(path: Path, rng: random.Random) -> None:
    path.write_text(json.dumps(changed(json.loads(path.read_text()), rng)))


def damage_tensors(path: Path, rng: random.Random) -> None:
    """Another dtype, shape, name or value, one less, one more, or bytes."""
    if rng.random() < 0.3:
        path.write_bytes(damaged(path.read_bytes(), rng))
        return
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    value = tensors.pop(name)
    change = rng.choice(("dtype", "shape", "name", "value", "more", "less"))
    if change == "dtype":
        value = value.to(rng.choice(DTYPES))
    elif change == "shape":
        value = rng.choice((value[:-1], value.flatten(), value[None], value[:0], value.flatten()[0], value.T))
    elif change == "name":
        name = rng.choice((name[:-1], name + ".x", "", "x", *BASE_NAMES, *(name.replace("A", "B"), name.upper())))
    elif change == "value":
        value = value.to(rng.choice((value.dtype, torch.float64))).clone()
        odd = (float("nan"), float("inf"), 1e300, 1e30) if value.dtype == torch.float64 else (-1, 0, 100, 1)
        value.view(-1)[: rng.choice((1, 100))] = rng.choice(odd)
    elif change == "more":
        tensors[rng.choice((*BASE_NAMES, "x", name + ".y"))] = torch.ones(rng.choice(((1,), (8, 32), (10**6, 1))))
    save_file(tensors | ({} if change == "less" else {name: value.contiguous()}), path)


def fuzz(
    whole: Path, work: Path, seeds: range, damage: Callable[[Path, random.Random], None], check: Callable[[Path], bool]
) -> None:
    """Damage copies of the folder `whole` and check each; some must be refused, and no check may cost memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    harmless = 0
    for seed in seeds:
        folder = work / f"seed-{seed}"
        shutil.copytree(whole, folder)
        damage(folder, random.Random(seed))
        try:
            harmless += check(folder)
        except BaseException as error:
            error.add_note(f"seed {seed}, files in {folder}")
            raise
        shutil.rmtree(folder)
    assert harmless < len(seeds)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MOST_MEMORY


# ---- adapters


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "whole"
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=EXPERT_PARAMETERS)
    model = get_peft_model(qwen_model(), config)
    model.save_pretrained(folder)
    save_router_hash(folder, model)
    return folder


def damage_config(folder: Path, rng: random.Random) -> None:
    path = folder / CONFIG
    if rng.random() < 0.15:
        path.write_bytes(damaged(path.read_bytes(), rng))
        return
    fields = json.loads(path.read_text())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        field = rng.choice(FIELDS)
        fields[field] = copy.deepcopy(rng.choice(VALUES))
    path.write_text(json.dumps(fields))


def damage_adapter(folder: Path, rng: random.Random) -> None:
    kind = rng.random()
    if kind < 0.6:
        damage_config(folder, rng)
    elif kind < 0.9:
        damage_tensors(folder / WEIGHTS, rng)
    else:
        write_changed_json(folder / HASH_FILE, rng)


@rounds
def test_an_adapter_is_refused_or_leaves_its_base(seeds, adapter, tmp_path):
    base = qwen_model()
    values = {name: value.clone() for name, value in base.state_dict().items()}
    logits = base(input_ids=IDS).logits

    def check(folder: Path) -> bool:
        model: Any = copy.deepcopy(base)
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        try:
            loaded = load_adapter(model, folder)
        except AdapterError:
            assert list(model.state_dict()) == list(values)
            unchanged = model(input_ids=IDS).logits
        else:
            assert loaded(input_ids=IDS).logits.isfinite().all()
            model.set_experts_implementation(base.config._experts_implementation)
            with loaded.disable_adapter():
                unchanged = loaded(input_ids=IDS).logits
        assert all(torch.equal(own[name], value) for name, value in values.items() if name in own)
        assert torch.equal(unchanged, logits)
        return model.state_dict().keys() != values.keys()

    fuzz(adapter, tmp_path, range(2 * seeds.start, 2 * seeds.stop), damage_adapter, check)


# ---- routing traces


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trace") / "whole"
    made = RoutingTrace([empty_statistics(name, 4, 2) for name in ("a", "b")], {"model_class": "Made"})
    for domain, counts in (("law", [4, 4, 2, 0]), (None, [1, 1, 0, 0])):
        counts = torch.tensor(counts)
        of_layer = {"counts": counts, "weight_mass": counts.double() / 2, "tokens": int(counts.sum()) // 2}
        pairs = torch.diag(counts)
        layers = [LayerStatistics(name, 4, 2, coactivation=pairs, dropped=None, **of_layer) for name in ("a", "b")]
        made.add(layers, domain)
    made.save(folder)
    return folder


def damage_trace(folder: Path, rng: random.Random) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        (folder / TRACE).write_bytes(damaged((folder / TRACE).read_bytes(), rng))
    elif kind == 1:
        damage_tensors(folder / STATISTICS, rng)
    else:
        write_changed_json(folder / TRACE, rng)


@rounds
def test_a_trace_is_refused_or_read(seeds, trace, tmp_path):
    def check(folder: Path) -> bool:
        try:
            read = RoutingTrace.load(folder)
        except (ValueError, FileNotFoundError):
            return False
        for name in read.layers:
            assert read.statistics(name).counts.sum() <= read.statistics(name).tokens * read.statistics(name).top_k
        return True

    fuzz(trace, tmp_path, range(5 * seeds.start, 5 * seeds.stop), damage_trace, check)


# ---- manifests of checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoint-7"
    (folder / "below").mkdir(parents=True)
    for name in ("model.safetensors", "trainer_state.json", "below/state.bin"):
        (folder / name).write_bytes(name.encode() * 9)
    seal(folder)
    return folder.parent


def damage_checkpoint(folder: Path, rng: random.Random) -> None:
    path = folder / "checkpoint-7" / rng.choice((MANIFEST, MANIFEST, MANIFEST, "model.safetensors", "below/state.bin"))
    if path.name != MANIFEST or rng.random() < 0.3:
        path.write_bytes(damaged(path.read_bytes(), rng).replace(NESTED, b"["))
    else:
        write_changed_json(path, rng)


@rounds
def test_a_manifest_says_what_is_wrong_or_all_is_there(seeds, checkpoint, tmp_path):
    names = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*"))

    def check(folder: Path) -> bool:
        is_whole = flaw(folder / "checkpoint-7") is None
        assert (newest_sealed(folder) is not None) == is_whole
        if is_whole:
            assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == names
        return is_whole

    fuzz(checkpoint, tmp_path, range(5 * seeds.start, 5 * seeds.stop), damage_checkpoint, check)
