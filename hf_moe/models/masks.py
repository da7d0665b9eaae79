"""Masks: the tokens that attention, routing and a classification head take; and the cache's name in transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_bidirectional_sliding_window_mask,
    create_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from .configuration_hf_moe import HfMoeConfig
from .transformers_names import cache_name, check_parameters

check_parameters(
    {
        create_causal_mask: ("config", "inputs_embeds", "attention_mask", "position_ids"),
        Qwen3MoeAttention.forward: ("hidden_states", "position_embeddings", "attention_mask"),
    }
)
CACHE = cache_name(create_causal_mask, Qwen3MoeAttention.forward)


def layer_mask(
    config: HfMoeConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor,
) -> Any:
    """The mask of every attention layer, in the form that the attention implementation of `config` takes."""
    arguments = {"config": config, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
    has_window = config.sliding_window is not None
    if not config.is_causal:
        create = create_bidirectional_sliding_window_mask if has_window else create_bidirectional_mask
        return create(**arguments)
    create = create_sliding_window_causal_mask if has_window else create_causal_mask
    return create(**arguments, **{CACHE: cache}, position_ids=position_ids)


def token_mask(
    config: HfMoeConfig, inputs_embeds: Tensor, attention_mask: Tensor | None, training: bool
) -> Tensor | None:
    """`[B, S]`, True for real tokens, where the routing asks: tokens compete for places in an expert."""
    competes = config.routing == "expert_choice" or (training and config.capacity_factor is not None)
    if not competes or attention_mask is None or attention_mask.dim() != 2:
        return None
    return attention_mask[:, -inputs_embeds.shape[1] :].bool()


def last_token(
    config: HfMoeConfig, hidden_states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None
) -> Tensor:
    """Position `[B]`, int64, of the last real token of each row, with left or right padding.

    Raises:
        ValueError: Several rows, and neither `attention_mask` nor `config.pad_token_id` tells what is padding.
    """
    batch, length = hidden_states.shape[:2]
    positions = torch.arange(length, device=hidden_states.device)
    if attention_mask is not None and attention_mask.dim() == 2:
        is_real = attention_mask[:, -length:].bool()
    elif input_ids is not None and config.pad_token_id is not None:
        is_real = input_ids != config.pad_token_id
    elif batch == 1:
        return positions[-1:]
    else:
        raise ValueError(
            f"Cannot tell the last token of {batch} rows: pass attention_mask [B, S], or set config.pad_token_id."
        )
    return (positions * is_real.to(positions)).argmax(-1)
