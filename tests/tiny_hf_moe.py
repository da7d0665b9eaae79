"""hf_moe models small enough to run in milliseconds, one for each option of the architecture."""

from pathlib import Path

import torch

from hf_moe.models.configuration_hf_moe import HfMoeConfig

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}

DECODERS = {
    "top_k": {},
    "sigmoid_groups_bias": {"router_scoring": "sigmoid", "router_bias": True, "n_group": 4, "topk_group": 2},
    "softmax_groups": {"n_group": 4, "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "shared_and_dense": {"num_shared_experts": 2, "first_k_dense_replace": 1, "mlp_only_layers": [2]},
    "null_experts": {"num_null_experts": 4},
    "top_p": {"routing": "top_p", "num_experts_per_tok": 4, "router_top_p": 0.4},
    "dense": {"routing": "dense"},
    "capacity_position": {"capacity_factor": 0.5},
    "capacity_probability": {"capacity_factor": 0.5, "drop_policy": "probability"},
    "jitter": {"router_jitter_noise": 0.1},
    "per_layer_config": {"per_layer_config": {1: {"num_experts": 4}, 2: {"num_experts_per_tok": 1}}},
    "global_batch": {"balance_scope": "global_batch"},
    "sliding_window": {"sliding_window": 4},
    "no_qk_norm": {"use_qk_norm": False, "attention_bias": True},
    "tied": {"tie_word_embeddings": True},
}
ENCODERS = {
    "bidirectional": {},
    "bidirectional_window": {"sliding_window": 4},
    "expert_choice": {"routing": "expert_choice"},
    "expert_choice_sigmoid": {"routing": "expert_choice", "router_scoring": "sigmoid", "capacity_factor": 2.0},
}


def tiny_config(**overrides) -> HfMoeConfig:
    return HfMoeConfig(**{**SIZES, **overrides})


def encoder_config(**overrides) -> HfMoeConfig:
    return tiny_config(is_causal=False, use_cache=False, **overrides)


def random_ids(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Token ids `[rows, length]` without the padding id 0."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (rows, length), generator=generator)


def left_padded(ids: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids with `count` padding tokens before them, and the mask."""
    padding = ids.new_zeros(ids.shape[0], count)
    return torch.cat([padding, ids], 1), torch.cat([padding, torch.ones_like(ids)], 1)


def make_code_old(folder: Path) -> str:
    """The folder as an earlier hf_moe saved it: a file says something else, another is not there yet."""
    path = folder / "modeling_hf_moe.py"
    imported = "from .late_gradient import LateGradient, attach_late_gradients\n"
    text = path.read_text().replace(imported, "LateGradient = attach_late_gradients = None\n")
    path.write_text(text)
    (folder / "late_gradient.py").unlink()
    return text
