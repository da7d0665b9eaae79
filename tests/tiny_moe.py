"""Tiny models, tokenizers and text for the tests of training, adapters, evaluation and observability."""

import random

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_moe.data.tokenizer import train_tokenizer
from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM
from tiny_hf_moe import tiny_config
from tiny_models import build_tiny

EXPERT_PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def hf_moe_model(seed: int = 0, **overrides) -> HfMoeForCausalLM:
    torch.manual_seed(seed)
    return HfMoeForCausalLM(tiny_config(**overrides)).eval()


def qwen_model(seed: int = 0) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return Qwen3MoeForCausalLM(config).eval()


MODELS = {"hf_moe": hf_moe_model, "qwen3_moe": qwen_model}


def with_expert_lora(model, **overrides):
    settings = {"target_modules": [], "target_parameters": EXPERT_PARAMETERS, "r": 2, "lora_dropout": 0.0}
    return get_peft_model(model, LoraConfig(**{**settings, **overrides}))


def in_own_memory(model):
    """Loaded weights lie in the file's memory at any address, and the last bit of a product may depend on it."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def words(count: int, seed: int = 0) -> str:
    """Text of made-up words, in paragraphs."""
    rng = random.Random(seed)
    made = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 7))) for _ in range(count)]
    return "\n\n".join(" ".join(made[i : i + 40]) for i in range(0, count, 40)) + "\n"


def tiny_tokenizer(vocab_size: int = 300):
    return train_tokenizer([words(400)], vocab_size=vocab_size, max_length=64)


def save_tiny_models(folder, families):
    """Models by family with the tiny tokenizer, each in a folder of its family's name; returns `folder`."""
    tokenizer = tiny_tokenizer()
    for family in families:
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 64}
        model = hf_moe_model(**sizes) if family == "hf_moe" else build_tiny(family, **sizes)[0]
        model.save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    return folder
