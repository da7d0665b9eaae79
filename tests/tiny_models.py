"""Tiny, randomly initialised models of every native MoE family of the installed transformers, for CPU tests.

A *family* is one experts class under transformers' `use_experts_implementation` decorator, named by its model folder
(plus the class where a folder has two), or a model type without a modeling file that runs on such a class. They are
discovered in the installed transformers, so the list follows its version. A tiny config is the family's default config
with every size field shrunk by name (`SIZES`, then `PATTERNS`); what a family needs beyond that stands in `OVERRIDES`.

    for family in FAMILIES:
        model, inputs = build_tiny(family)   # eval mode, float32, seeded
        model(**inputs)
"""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB, HIDDEN, EXPERTS, TOP_K, WIDTH, LAYERS = 96, 32, 8, 2, 24, 3
BATCH, LENGTH = 2, 8

SIZES: dict[str, int] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "qk_head_dim": 16,
    "n_routed_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_shared_experts": 1,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_num_heads": 8,
}
# for int fields not named above; the first match counts, and a field is never made larger
PATTERNS: dict[str, int] = {
    r".*intermediate_size": WIDTH,
    r".*head_dim": 8,
    r".*_rank": 16,
    r".*_num_key_heads": 2,
    r".*_heads": 4,
    r".*sliding_window(_size)?": 4,
    r".*(chunk|block|state)_size": 8,
    r".*_d_state": 8,
    r".*hidden_size": 16,
    r"index_topk": 4,
    r"vocab_size_.*": VOCAB,
}
# the same in every family, also where the default config has none or fewer: without them there are no routed experts
EXPERT_FIELDS = (
    "n_routed_experts",
    "n_shared_experts",
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "top_k_experts",
    "moe_topk",
    "moe_intermediate_size",
)
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "ernie4_5_vl_moe": {
        # one width for the text experts, one for the vision experts of the same layer
        "moe_intermediate_size": [WIDTH, WIDTH // 2],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}},
    "glm5_next": {"index_kpool": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hy_v4_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "mistral4": {"head_dim": 16},
    "qwen3_omni_moe:Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": WIDTH},
    "qwen4_exp": {
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "zaya": {"num_experts_per_tok": 1},  # all that it supports
}
# a second decorated class of one folder lives in a model class of its own
MODEL_CLASS = {"qwen3_omni_moe:Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel"}
# the cheapest class that runs from token ids alone comes first
PREFERRED = ("ForCausalLM", "ForTokenClassification", "TextModel", "Model")


@dataclass(frozen=True)
class Family:
    """One experts class under transformers' decorator: its modeling module, its name, whose configuration it runs."""

    module: str
    experts_class: str
    model_type: str | None = None  # of a family without a modeling file


def _discover() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        folder = file.parent.name
        classes = re.findall(r"^@use_experts_implementation(?:\(.*\))?\nclass (\w+)", file.read_text(), re.M)
        for name in classes:
            key = folder if len(classes) == 1 else f"{folder}:{name}"
            found[key] = Family(f"transformers.models.{folder}.{file.stem}", name)
    return found | _without_a_modeling_file({family.module: family for family in found.values()})


def _without_a_modeling_file(by_module: dict[str, Family]) -> dict[str, Family]:
    """Model types that the Auto class sends to another family's model."""
    found = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        folder = model_type_to_module_name(model_type)
        if list((Path(transformers.__file__).parent / "models" / folder).glob("modeling_*.py")):
            continue
        cls = getattr(transformers, names, None) if isinstance(names, str) else None
        if cls is not None and cls.__module__ in by_module:
            found[model_type] = replace(by_module[cls.__module__], model_type=model_type)
    return found


_FAMILIES = _discover()
FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
# decorated experts classes by version of transformers: the README names the newest
CLASSES = {(5, 17): 55, (5, 23): 65, (5, 24): 68}
NUM_CLASSES = len({family.experts_class for family in _FAMILIES.values()})


def experts_class(family: str) -> type[nn.Module]:
    found = _FAMILIES[family]
    return getattr(importlib.import_module(found.module), found.experts_class)


def model_class(family: str) -> type[PreTrainedModel]:
    """The model class that `build_tiny` instantiates."""
    module = importlib.import_module(_FAMILIES[family].module)
    if family in MODEL_CLASS:
        return getattr(module, MODEL_CLASS[family])
    classes = [
        cls
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and name.endswith(PREFERRED)
    ]
    own = [cls for cls in classes if cls.__module__ == module.__name__]
    return min(own, key=lambda cls: next(i for i, end in enumerate(PREFERRED) if cls.__name__.endswith(end)))


def tiny_kwargs(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Constructor arguments that make the default config of `config_class` tiny, field by field."""
    default = config_class().to_dict()
    kwargs = {field: _tiny_value(field, value, default) for field, value in default.items()}
    if default.get("num_key_value_heads") == default.get("num_attention_heads"):
        kwargs["num_key_value_heads"] = SIZES["num_attention_heads"]
    return {field: value for field, value in kwargs.items() if value != default.get(field)}


def _tiny_value(field: str, value: Any, default: dict[str, Any]) -> Any:
    if field in EXPERT_FIELDS:
        return SIZES[field]
    if value is None:
        return None
    if field.endswith(("token_id", "token_index", "_bos_id", "_pad_id", "_eos_id")):
        return 0 if field == "pad_token_id" else 1
    if isinstance(value, int) and not isinstance(value, bool):
        pattern = next((size for name, size in PATTERNS.items() if re.fullmatch(name, field)), value)
        return min(value, SIZES.get(field, pattern))
    if isinstance(value, list) and len(value) == default.get("num_hidden_layers") and isinstance(value[0], str):
        return _tiny_per_layer(value)
    return value


def _tiny_per_layer(values: list[str]) -> list[str]:
    """`LAYERS` entries that keep the distinct values of a per-layer list, full attention or sparse layers last."""
    distinct = sorted(dict.fromkeys(values), key=lambda value: value in ("full_attention", "sparse"))[-LAYERS:]
    missing = LAYERS - len(distinct)
    if distinct[-1] == "sparse":
        return distinct + ["sparse"] * missing
    return distinct[:1] * missing + distinct


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    model_type = _FAMILIES[family].model_type
    config_class = type(AutoConfig.for_model(model_type)) if model_type else model_class(family).config_class
    return config_class(**{**tiny_kwargs(config_class), **OVERRIDES.get(family, {}), **overrides})


def tiny_inputs(model: PreTrainedModel, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids [BATCH, LENGTH] with a full mask; embeddings where the model has no token embedding of its own."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if type(model).__name__ == "Ernie4_5_VLMoeTextModel":  # it sends text and vision tokens to experts of their own
        vision = torch.zeros_like(ids).index_fill(1, torch.arange(2, 5), 1)
        return {"input_ids": ids, "attention_mask": mask, "moe_mm_token_type_ids": vision}
    if type(model).__name__ == "Qwen3OmniMoeTalkerModel":
        return {"inputs_embeds": torch.randn(BATCH, LENGTH, HIDDEN, generator=generator), "attention_mask": mask}
    return {"input_ids": ids, "attention_mask": mask}


def build_tiny(family: str, *, seed: int = 0, **overrides: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """Build `family` tiny, in eval mode and float32, and inputs for its forward.

    `overrides` are config fields that go on top of the tiny ones.
    """
    torch.manual_seed(seed)
    model = model_class(family)(tiny_config(family, **overrides)).eval()
    _randomise(model)
    return model, tiny_inputs(model, seed)


@torch.no_grad()
def _randomise(model: PreTrainedModel) -> None:
    """Draw every matrix: transformers leaves some uninitialised (Qwen3-Omni's talker's experts) or zero (routers)."""
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.normal_(std=0.1)
    for name, table in model.named_buffers():
        # DeepSeek-V4's hash router looks experts up by token id
        if name.endswith("tid2eid"):
            table.copy_(torch.randint(0, EXPERTS, table.shape))
