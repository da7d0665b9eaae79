"""With the same weights, softmax top-k routing is the native models' bit for bit, and so is a whole model."""

import pytest
import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hf_moe.models.configuration_hf_moe import HfMoeConfig
from hf_moe.models.modeling_hf_moe import HfMoeForCausalLM, HfMoeRouter

# Mixtral has no norm_topk_prob: it always normalises
ROUTERS = {
    "mixtral": (MixtralConfig, MixtralTopKRouter, True),
    "olmoe": (OlmoeConfig, OlmoeTopKRouter, False),
    "olmoe_normalised": (OlmoeConfig, OlmoeTopKRouter, True),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeTopKRouter, False),
    "qwen3_moe_normalised": (Qwen3MoeConfig, Qwen3MoeTopKRouter, True),
}
SIZES = [(33, 16, 8, 2), (64, 64, 64, 8), (17, 40, 6, 6), (1, 16, 4, 1), (0, 16, 4, 2), (5, 8, 1, 1)]


def build_routers(native: str, hidden_size: int, num_experts: int, top_k: int):
    config_class, router_class, norm_topk_prob = ROUTERS[native]
    sizes = {"hidden_size": hidden_size, "num_experts_per_tok": top_k}
    name = "num_local_experts" if config_class is MixtralConfig else "num_experts"
    theirs = router_class(config_class(**sizes, **{name: num_experts}, norm_topk_prob=norm_topk_prob))
    ours = HfMoeRouter(
        HfMoeConfig(
            **sizes,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=num_experts,
            norm_topk_prob=norm_topk_prob,
        )
    )
    with torch.no_grad():
        theirs.weight.normal_()
        ours.weight.copy_(theirs.weight)
    return ours, theirs


@pytest.mark.parametrize("native", ROUTERS)
@pytest.mark.parametrize(("tokens", "hidden_size", "num_experts", "top_k"), SIZES)
@pytest.mark.parametrize("training", [False, True])
def test_router_equals_the_native_one_bit_for_bit(native, tokens, hidden_size, num_experts, top_k, training):
    ours, theirs = build_routers(native, hidden_size, num_experts, top_k)
    hidden = torch.randn(tokens, hidden_size)
    actual, expected = ours.train(training)(hidden), theirs.train(training)(hidden)
    for ours_item, theirs_item in zip(actual[:3], expected, strict=True):
        assert ours_item.dtype == theirs_item.dtype
        assert torch.equal(ours_item, theirs_item)


@pytest.mark.parametrize("native", ["mixtral", "olmoe_normalised", "qwen3_moe"])
def test_router_gradient_equals_the_native_one_bit_for_bit(native):
    ours, theirs = build_routers(native, 16, 8, 2)
    hidden, cotangent = torch.randn(33, 16), torch.randn(33, 2)
    ours_gradient, theirs_gradient = (
        torch.autograd.grad((router(hidden)[1] * cotangent).sum(), router.weight)[0] for router in (ours, theirs)
    )
    assert torch.equal(ours_gradient, theirs_gradient)


LAYOUT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
    "router_aux_loss_coef": 0.0,
}
QWEN3 = {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 8}


def native_models() -> dict[str, tuple[PreTrainedConfig, type[PreTrainedModel], dict]]:
    """Native configuration, model class, and the fields by which ours says the same."""
    dense_first = {**QWEN3, "mlp_only_layers": [0]}
    tied = {**QWEN3, "tie_word_embeddings": True, "attention_bias": True}
    return {
        "qwen3_moe": (Qwen3MoeConfig(**LAYOUT, **QWEN3, norm_topk_prob=True), Qwen3MoeForCausalLM, QWEN3),
        "qwen3_moe_hybrid": (
            Qwen3MoeConfig(**LAYOUT, **dense_first, norm_topk_prob=False),
            Qwen3MoeForCausalLM,
            {**dense_first, "norm_topk_prob": False},
        ),
        "qwen3_moe_tied_biased": (Qwen3MoeConfig(**LAYOUT, **tied, norm_topk_prob=True), Qwen3MoeForCausalLM, tied),
        "mixtral": (
            MixtralConfig(**LAYOUT, intermediate_size=24, num_local_experts=8),
            MixtralForCausalLM,
            {"moe_intermediate_size": 24, "num_experts": 8, "use_qk_norm": False},
        ),
    }


def build_models(name: str, experts: str, attention: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    native_config, model_class, fields = native_models()[name]
    config = HfMoeConfig(**LAYOUT, **fields, rope_parameters=native_config.rope_parameters, router_z_loss_coef=0.0)
    ours, theirs = HfMoeForCausalLM(config), model_class(native_config)
    for model in (ours, theirs):
        model.set_experts_implementation(experts)
        model.set_attn_implementation(attention)
        model.eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def left_padded_batch() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(0, 96, (3, 11))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :4] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@pytest.mark.parametrize("name", native_models())
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_gradients_equal_the_native_models_bit_for_bit(name, experts, attention):
    ours, theirs = build_models(name, experts, attention)
    batch = left_padded_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    actual, expected = (model(**batch, labels=labels, output_router_logits=True) for model in (ours, theirs))
    assert torch.equal(actual.logits, expected.logits)
    assert len(actual.router_logits) == len(expected.router_logits)
    assert all(map(torch.equal, actual.router_logits, expected.router_logits))
    assert torch.equal(actual.loss, expected.loss)
    actual.loss.backward()
    expected.loss.backward()
    expected_gradients = {parameter: p.grad for parameter, p in theirs.named_parameters()}
    for parameter, p in ours.named_parameters():
        assert torch.equal(p.grad, expected_gradients[parameter]), parameter


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_greedy_generation_equals_the_native_models(name):
    ours, theirs = build_models(name, "eager", "sdpa")
    batch = left_padded_batch()
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(ours.generate(**batch, **settings), theirs.generate(**batch, **settings))
