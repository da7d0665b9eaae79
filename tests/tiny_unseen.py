"""Tiny models of every native family whose experts do not go through transformers' experts interface."""

import importlib

import transformers

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def llama4():
    sizes = {**SMALL, "intermediate_size_mlp": 24, "num_local_experts": 4, "pad_token_id": 0}
    return transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes))


def switch():
    sizes = {"vocab_size": 96, "d_model": 32, "d_ff": 24, "d_kv": 8, "num_heads": 4, "num_layers": 4}
    config = transformers.SwitchTransformersConfig(**sizes, num_decoder_layers=2, num_experts=4)
    return transformers.SwitchTransformersForConditionalGeneration(config)


def nllb_moe():
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"ffn_dim": 24, "layers": 2, "sparse_step": 2, "attention_heads": 4}.items()
    }
    config = transformers.NllbMoeConfig(vocab_size=96, d_model=32, num_experts=4, **sides)
    return transformers.NllbMoeForConditionalGeneration(config)


def dbrx():
    config = transformers.DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=1,
        vocab_size=96,
        max_seq_len=64,
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0},
    )
    return transformers.DbrxForCausalLM(config)


def jetmoe():
    sizes = {key: value for key, value in SMALL.items() if key not in ("num_attention_heads", "head_dim")}
    config = transformers.JetMoeConfig(**sizes, kv_channels=8, num_local_experts=4, num_experts_per_tok=2)
    return transformers.JetMoeForCausalLM(config)


def longcat_flash():
    sizes = {**SMALL, "num_key_value_heads": 4, "num_layers": 1, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 24}
    ranks = dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8)
    config = transformers.LongcatFlashConfig(**sizes, **ranks, n_routed_experts=4, zero_expert_num=2, moe_topk=2)
    return transformers.LongcatFlashForCausalLM(config)


def doge():
    return transformers.DogeForCausalLM(transformers.DogeConfig(**SMALL, is_moe=True, num_experts=16))


def step3p7():
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "share_expert_dim": 24}
    text = {**SMALL, **sizes, "mlp_layer_types": ["dense", "sparse"]}
    config = transformers.Step3p7TextConfig(**text)
    return importlib.import_module("transformers.models.step3p7.modeling_step3p7").Step3p7TextModel(config)


def vitpose_backbone():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": [32, 32]}
    config = transformers.VitPoseBackboneConfig(**sizes, patch_size=[16, 16], num_experts=4, part_features=16)
    return transformers.VitPoseBackbone(config)


UNSEEN = (llama4, switch, nllb_moe, dbrx, jetmoe, longcat_flash, doge, step3p7, vitpose_backbone)
