"""MoE models whose experts do not go through transformers' interface: named as such by everything that needs layers."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from hf_moe.adapters.expert_lora import expert_lora_config
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.adapters.select_experts import select_experts
from hf_moe.models.unseen_experts import required_layers, unseen_experts
from hf_moe.models.watch_routing import watch_routing
from hf_moe.observability.explain import explain
from hf_moe.training.balancing_checks import BalancingError, balanced_layers
from hf_moe.training.balancing_config import BalancingConfig
from tiny_models import build_tiny

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
    text = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = transformers.Step3p7TextConfig(**text)
    return transformers.AutoModel.from_config(config)


def vitpose_backbone():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": [32, 32]}
    config = transformers.VitPoseBackboneConfig(**sizes, patch_size=[16, 16], num_experts=4, part_features=16)
    return transformers.VitPoseBackbone(config)


UNSEEN = (llama4, switch, nllb_moe, dbrx, jetmoe, longcat_flash, doge, step3p7, vitpose_backbone)


def test_every_family_without_the_interface_is_here():
    experts = re.compile(r"^class \w*(Experts|MoE|Moe|SparseMLP)\w*\((nn\.)?Module(Dict|List)?\)", re.M)
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = file.read_text()
        if experts.search(text) and not re.search("^@use_experts_implementation", text, re.M):
            found.add(file.parent.name)
    names = {build.__name__ for build in UNSEEN} - {"switch"} | {"switch_transformers"}
    assert found - {"aria"} <= names  # aria's experts: until transformers 5.17


@pytest.mark.parametrize("build", UNSEEN, ids=lambda build: build.__name__)
def test_every_command_names_them(build):
    with torch.device("meta"):
        model = build()
    explained = explain(model)
    assert explained.active_parameters is None
    (warning,) = explained.warnings
    assert warning == unseen_experts(model, []) and type(model).__name__ in warning
    assert "outside of transformers' experts interface" in warning
    assert "active per token not known" in str(explained)
    for needs_layers in (
        required_layers,
        expert_lora_config,
        freeze_router,
        lambda model: select_experts(model, [[1, 2, 3]]),
        lambda model: watch_routing(model, print).__enter__(),
    ):
        with pytest.raises(ValueError, match="outside of transformers' experts interface") as raised:
            needs_layers(model)
        assert "Mixture-of-Experts model" not in str(raised.value)
    with pytest.raises(BalancingError, match="outside of transformers' experts interface"):
        balanced_layers(model, BalancingConfig(aux_loss_coef=0.01))


def test_experts_of_code_that_records_no_router_are_named():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    assert "(0-1.experts)" in str(unseen_experts(nn.Sequential(Block(), Block()), []))
    assert unseen_experts(nn.Sequential(nn.Linear(4, 4)), []) is None
    seen, _ = build_tiny("qwen3_moe")
    seen.more = Block()
    assert "(more.experts)" in explain(seen).warnings[0]
    assert explain(seen).active_parameters is None


def test_a_config_that_speaks_of_experts_which_are_not_there():
    with torch.device("meta"):
        model = transformers.DogeForCausalLM(transformers.DogeConfig(**SMALL))
    assert "config says num_experts=16384: either it is built dense, or" in explain(model).warnings[0]
