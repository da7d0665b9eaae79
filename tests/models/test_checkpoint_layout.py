"""Round trips of checkpoints bit for bit, and the refusal of everything that would load as another model.

transformers loads the same damaged files without complaint: `test_transformers_alone_accepts` is the control.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from spoilt_checkpoints import (
    BIAS,
    CASES,
    DOWN,
    NORM,
    QUERY,
    ROUTER,
    SHARD_SIZE,
    SIZES,
    UP,
    Case,
    assert_same_tensors,
    build,
    change,
    drop,
    edit,
    hub_cache,
    set_element,
    stored,
)
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_moe.models.checkpoint_files import INDEX_FILE, SINGLE_FILE, CheckpointError
from hf_moe.models.checkpoint_layout import HEAD_TENSORS, is_finite, register_conversion_mapping
from hf_moe.models.modeling_hf_moe import (
    HfMoeForCausalLM,
    HfMoeForQuestionAnswering,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
)
from tiny_moe import in_own_memory

HEADS = [
    HfMoeModel,
    HfMoeForCausalLM,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeForQuestionAnswering,
]


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
    assert torch.equal(in_own_memory(loaded)(tokens).logits, model(tokens).logits)
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
    for model_class in HEADS[1:]:
        model, report = model_class.from_pretrained(tmp_path / "base", output_loading_info=True)
        assert_same_tensors(model.model, base)
        assert report["missing_keys"] == set(HEAD_TENSORS[model_class.__name__])
        assert all(is_finite(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("model_class", HEADS[1:])
def test_the_table_of_heads(model_class: type) -> None:
    names = {name for name in build(model_class).state_dict() if not name.startswith("model.")}
    assert set(HEAD_TENSORS[model_class.__name__]) == names


SURPLUS = {
    "a name of nothing": (HfMoeForCausalLM, HfMoeForCausalLM, "x"),
    "a name of nothing, other head": (HfMoeForCausalLM, HfMoeForSequenceClassification, "x"),
    "a name of nothing, base model": (HfMoeModel, HfMoeModel, "x"),
    "head of another class": (HfMoeForCausalLM, HfMoeForCausalLM, "score.weight"),
    "head that the saved class lacks": (HfMoeForCausalLM, HfMoeModel, "score.weight"),
    "head beside the saved one": (HfMoeForSequenceClassification, HfMoeForSequenceClassification, "lm_head.weight"),
    "bias of a head": (HfMoeForCausalLM, HfMoeForCausalLM, "lm_head.bias"),
}


@pytest.mark.parametrize(("saved_class", "loaded_class", "name"), SURPLUS.values(), ids=SURPLUS.keys())
def test_a_surplus_tensor_is_refused(saved_class: type, loaded_class: type, name: str, tmp_path: Path) -> None:
    """transformers reports it, and loads without it."""
    build(saved_class).save_pretrained(tmp_path)
    first = next(iter(stored(tmp_path)))
    edit(tmp_path, first, lambda tensors: tensors.update({name: torch.ones(40, 16)}))
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} in .*model\.safetensors has no place"):
        loaded_class.from_pretrained(tmp_path)


def test_a_tied_head_in_the_file_is_the_embeddings(tmp_path: Path) -> None:
    """transformers unties a head that differs, with a warning."""
    model = build(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    embeddings = model.model.embed_tokens.weight.detach()
    edit(tmp_path, NORM, lambda tensors: tensors.update({"lm_head.weight": embeddings.clone()}))
    assert_same_tensors(HfMoeForCausalLM.from_pretrained(tmp_path), model)
    assert_same_tensors(
        HfMoeForCausalLM.from_pretrained(None, config=model.config, state_dict=dict(model.state_dict())), model
    )
    edit(tmp_path, NORM, lambda tensors: tensors.update({"lm_head.weight": embeddings + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight in .*model\.safetensors differs from model\.embed"):
        HfMoeForCausalLM.from_pretrained(tmp_path)


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
    # what transformers raises, and code for it catches
    with pytest.raises(RuntimeError, match=r"score\.weight in .* has shape \[2, 16\].*ignore_mismatched_sizes=True"):
        HfMoeForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    options = {"num_labels": 5, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, report = HfMoeForSequenceClassification.from_pretrained(tmp_path, **options)
    assert model.score.weight.shape == (5, 16)
    assert {name for name, *_ in report["mismatched_keys"]} == {"score.weight"}
    with pytest.raises(CheckpointError, match=r"gate\.weight in .* has shape \[4, 16\], not \[8, 16\]"):
        HfMoeForSequenceClassification.from_pretrained(tmp_path, num_experts=8, ignore_mismatched_sizes=True)


# The reject list


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
def test_transformers_alone_accepts(name: str, tmp_path: Path) -> None:
    """The control: the checks above are not those of transformers."""
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
    # in this order: a plain save removes the shards of every variant (transformers does)
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


class Quantizer(HfQuantizer):
    """Stores the query projections as int8 with one scale each: like real ones it adds tensors and changes dtypes."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        for name, module in model.named_modules():
            if name.endswith("q_proj"):
                module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
                module.register_buffer("weight_scale", torch.empty((), device="meta"))

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name.endswith("q_proj.weight")

    def get_quantize_ops(self) -> ConversionOps:
        return ToInt8()

    def is_serializable(self) -> bool:
        return True

    def is_trainable(self) -> bool:
        return False


class ToInt8(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        ((name, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        scale = value.abs().max() / 127
        return {name: (value / scale).round().char(), f"{name}_scale": scale}


@pytest.fixture
def quantization() -> Iterator[QuantizationConfigMixin]:
    class Int8Queries(QuantizationConfigMixin):
        def __init__(self, **kwargs: Any):
            super().__init__(quant_method="int8_queries")

    AUTO_QUANTIZATION_CONFIG_MAPPING["int8_queries"] = Int8Queries
    AUTO_QUANTIZER_MAPPING["int8_queries"] = Quantizer
    yield Int8Queries()
    del AUTO_QUANTIZATION_CONFIG_MAPPING["int8_queries"], AUTO_QUANTIZER_MAPPING["int8_queries"]


@pytest.mark.parametrize("before", [True, False], ids=["stored_quantised", "quantised_while_loading"])
def test_quantised_models(before: bool, quantization: QuantizationConfigMixin, single: Path, tmp_path: Path) -> None:
    folder, options = single, {"quantization_config": quantization}
    model = HfMoeForCausalLM.from_pretrained(folder, **options)
    if before:
        folder, options = tmp_path / "quantised", {}
        model.save_pretrained(folder)
    loaded = HfMoeForCausalLM.from_pretrained(folder, **options)
    assert loaded.get_parameter(QUERY).dtype == torch.int8
    assert_same_tensors(loaded, model)
    spoilt = Path(shutil.copytree(folder, tmp_path / "nan"))
    change(DOWN, set_element(float("nan")))(spoilt)
    with pytest.raises(CheckpointError, match=rf"{DOWN} in .*nan/model\.safetensors has NaN"):
        HfMoeForCausalLM.from_pretrained(spoilt, **options)
    for name in (NORM, DOWN, QUERY):
        spoilt = Path(shutil.copytree(folder, tmp_path / name))
        drop(name)(spoilt)
        if name == QUERY and before:
            drop(f"{QUERY}_scale")(spoilt)
        module = re.escape(name.removesuffix(".weight"))
        with pytest.raises(CheckpointError, match=rf"{module}.* in .*model\.safetensors"):
            HfMoeForCausalLM.from_pretrained(spoilt, **options)


def test_loading_info_is_that_of_transformers(single: Path) -> None:
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
