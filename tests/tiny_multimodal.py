"""Tiny models of every native class whose MoE layers stand beside vision or audio towers, whole, for CPU tests.

A config that holds configs: each part is shrunk as `tiny_models` does it, and what a part needs beyond that stands in
`OVERRIDES`, by its model type. The ids of image, video and audio tokens lie at the end of the vocabulary.

    for kind in MULTIMODAL:
        model, inputs = build_multimodal(kind)   # eval mode, float32, seeded
        model(**inputs)
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_moe.loading.auto_classes import whole_auto_class
from tiny_models import _FAMILIES, EXPERTS, HIDDEN, TOP_K, VOCAB, WIDTH, tiny_kwargs
from tiny_models import OVERRIDES as TEXT_OVERRIDES

# fields of a tower that are the text model's hidden size
TEXT_WIDTHS = ("text_hidden_size", "out_hidden_size", "output_dim", "adapter_out_dim")
OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2_sam_vision_model": {"output_channels": 16, "downsample_channels": [16, 16], "mlp_dim": 16},
    "dots3_note_audio_encoder": {"adapter_input_size": HIDDEN},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": HIDDEN,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": WIDTH,
    },
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "inkling_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCAB},
    "inkling_vision": {"patch_size": 4, "num_hidden_layers": 2},
    "muse_spark_audio": {"patch_sizes": [4], "hidden_sizes": [16], "depths": [1], "num_hidden_layers": 1},
    "qwen3_omni_moe_audio_encoder": {
        "encoder_layers": 1,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 16,
        "d_model": 16,
        "downsample_hidden_size": 8,
    },
    "qwen3_omni_moe_thinker": {"vision_start_token_id": VOCAB - 8, "audio_end_token_id": VOCAB - 9},
    "unlimited_ocr_sam_vision_model": {"output_channels": 16, "downsample_channels": [16, 16], "mlp_dim": 16},
}
# what transformers imports for a family
_NEEDS = {"inkling_mm_model": "scipy"}
_FOLDERS = {family.module.split(".")[2] for family in _FAMILIES.values()}
_KINDS = {
    **modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}


def _discover() -> tuple[str, ...]:
    """Model types whose config holds a text config, in folders with experts under the decorator."""
    known = {kind: CONFIG_MAPPING[kind] for kind in sorted(_KINDS) if kind in CONFIG_MAPPING}
    return tuple(
        kind
        for kind, config_class in known.items()
        if config_class.__module__.split(".")[2] in _FOLDERS
        and "text_config" in config_class.sub_configs
        and (kind not in _NEEDS or find_spec(_NEEDS[kind]) is not None)
    )


def multimodal_config(kind: str, **text: Any) -> PreTrainedConfig:
    """`text` are fields of the text model's config."""
    config_class = CONFIG_MAPPING[kind]
    return _tiny(config_class, text)


def _tiny(config_class: type[PreTrainedConfig], text: dict[str, Any]) -> PreTrainedConfig:
    default = config_class()
    kwargs = tiny_kwargs(config_class)
    for name, part_class in config_class.sub_configs.items():
        part = getattr(default, name, None)
        kwargs.pop(name, None)
        if part is not None or name == "vision_config":
            # transformers 5.17 leaves open which vision model DiffusionGemma has
            known = CONFIG_MAPPING["gemma4_vision"] if part_class is AutoConfig else part_class
            kwargs[name] = _tiny(known if part is None else type(part), text).to_dict()
    fields = default.to_dict()
    if {"vocab_size", "num_hidden_layers"} <= set(fields) and "text" in config_class.__name__.lower():
        kwargs |= TEXT_OVERRIDES.get(config_class.__module__.split(".")[2], {}) | text
    elif "text_config" not in kwargs:
        kwargs |= {name: HIDDEN for name in TEXT_WIDTHS if name in fields}
    others = ("image", "video", "audio", "vision")
    special = [name for name in fields if name.startswith(others) and name.endswith("_id")]
    kwargs |= {name: VOCAB - 1 - place for place, name in enumerate(special)}
    return config_class(**{**kwargs, **OVERRIDES.get(config_class.model_type, {})})


MULTIMODAL = _discover()


def build_multimodal(kind: str, *, seed: int = 0, **text: Any) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The whole model with every parameter drawn, and text alone as inputs."""
    torch.manual_seed(seed)
    config = multimodal_config(kind, **text)
    model = whole_auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    ids = torch.randint(4, 80, (2, 8), generator=torch.Generator().manual_seed(seed))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
