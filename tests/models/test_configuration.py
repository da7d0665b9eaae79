"""Each field is checked when the configuration is built, and every error says value, rule and way out."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe.models.configuration_hf_moe import ALLOW_HUGE, HfMoeConfig
from tiny_hf_moe import DECODERS, ENCODERS, encoder_config, tiny_config

NAN, INF = float("nan"), float("inf")


def rope(kind, **values):
    return {"rope_type": kind, "rope_theta": 1e4, **values}


# name: (fields, what the message must hold: the field and the value, and where it helps the rule or way out)
BAD = {
    "experts_per_token_zero": ({"num_experts_per_tok": 0}, ["num_experts_per_tok", "at least 1", "0"]),
    "experts_per_token_negative": ({"num_experts_per_tok": -1}, ["num_experts_per_tok", "-1"]),
    "experts_per_token_above_experts": ({"num_experts_per_tok": 9}, ["num_experts_per_tok", "[1, 8]", "9"]),
    "experts_per_token_string": ({"num_experts_per_tok": "2"}, ["num_experts_per_tok", "expected int", "'2'"]),
    "experts_per_token_float": ({"num_experts_per_tok": 2.0}, ["num_experts_per_tok", "expected int"]),
    "experts_per_token_bool": ({"num_experts_per_tok": True}, ["num_experts_per_tok", "bool"]),
    "experts_per_token_none": ({"num_experts_per_tok": None}, ["num_experts_per_tok", "expected int"]),
    "no_experts": ({"num_experts": 0}, ["num_experts", "at least 1", "0"]),
    "negative_experts": ({"num_experts": -4}, ["num_experts", "-4"]),
    "too_many_experts": ({"num_experts": 10**7}, ["num_experts", "65,536", "10000000"]),
    "too_many_null_experts": ({"num_null_experts": 10**7}, ["num_null_experts", "65536"]),
    "huge": ({"hidden_size": 10**6, "num_experts": 60_000}, ["parameters", "TiB", ALLOW_HUGE]),
    "huge_vocabulary": ({"vocab_size": 10**13}, ["vocab_size=10000000000000", ALLOW_HUGE]),
    "aux_coefficient_nan": ({"router_aux_loss_coef": NAN}, ["router_aux_loss_coef", "finite", "nan"]),
    "aux_coefficient_negative": ({"router_aux_loss_coef": -0.1}, ["router_aux_loss_coef", "-0.1"]),
    "z_coefficient_infinite": ({"router_z_loss_coef": INF}, ["router_z_loss_coef", "inf"]),
    "jitter_nan": ({"router_jitter_noise": NAN}, ["router_jitter_noise", "[0, 1)", "nan"]),
    "jitter_one": ({"router_jitter_noise": 1.0}, ["router_jitter_noise", "[0, 1)"]),
    "eps_nan": ({"rms_norm_eps": NAN}, ["rms_norm_eps", "nan"]),
    "eps_zero": ({"rms_norm_eps": 0.0}, ["rms_norm_eps", "positive"]),
    "scale_zero": ({"routed_scaling_factor": 0.0}, ["routed_scaling_factor", "positive"]),
    "dropout_one": ({"attention_dropout": 1.0}, ["attention_dropout", "[0, 1)"]),
    "capacity_zero": ({"capacity_factor": 0.0}, ["capacity_factor", "positive", "None"]),
    "capacity_nan": ({"capacity_factor": NAN}, ["capacity_factor", "nan"]),
    "capacity_dense": ({"capacity_factor": 1.0, "routing": "dense"}, ["capacity_factor", "dense"]),
    "unknown_routing": ({"routing": "soft"}, ["routing", "top_k", "soft"]),
    "unknown_scoring": ({"router_scoring": "tanh"}, ["router_scoring", "softmax", "tanh"]),
    "unknown_drop_policy": ({"drop_policy": "random"}, ["drop_policy", "position", "random"]),
    "unknown_balance_scope": ({"balance_scope": "sequence"}, ["balance_scope", "global_batch", "sequence"]),
    "unknown_activation": ({"hidden_act": "siluu"}, ["hidden_act", "siluu"]),
    "top_p_sigmoid": ({"routing": "top_p", "router_scoring": "sigmoid"}, ["router_scoring", "softmax", "top_p"]),
    "top_p_threshold_zero": ({"router_top_p": 0.0}, ["router_top_p", "(0, 1]"]),
    "top_p_threshold_above_one": ({"router_top_p": 1.5}, ["router_top_p", "1.5"]),
    "expert_choice_causal": ({"routing": "expert_choice"}, ["expert_choice", "is_causal=False", "top_k"]),
    "cache_without_causality": ({"is_causal": False}, ["use_cache=False", "is_causal"]),
    "groups_do_not_divide": ({"n_group": 3, "topk_group": 1}, ["n_group", "divide", "8"]),
    "more_groups_open_than_there_are": ({"n_group": 2, "topk_group": 3}, ["topk_group", "[1, 2]", "3"]),
    "groups_too_small": (
        {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3},
        ["num_experts_per_tok", "2 experts", "topk_group=1"],
    ),
    "sigmoid_groups_of_one": ({"n_group": 8, "topk_group": 4, "router_scoring": "sigmoid"}, ["n_group", "best 2"]),
    "bias_with_dense": ({"router_bias": True, "routing": "dense"}, ["router_bias", "top_k"]),
    "groups_with_top_p": ({"n_group": 2, "topk_group": 1, "routing": "top_p"}, ["n_group", "top_k"]),
    "null_experts_with_groups": (
        {"num_null_experts": 2, "n_group": 2, "topk_group": 1},
        ["num_null_experts", "n_group"],
    ),
    "negative_shared": ({"num_shared_experts": -1}, ["num_shared_experts", "-1"]),
    "dense_layer_out_of_range": ({"mlp_only_layers": [3]}, ["mlp_only_layers", "num_hidden_layers (3)"]),
    "dense_layers_string": ({"mlp_only_layers": "0"}, ["mlp_only_layers", "list"]),
    "heads_not_divisible": ({"num_key_value_heads": 3}, ["num_key_value_heads", "divide", "4"]),
    "no_heads": ({"num_attention_heads": 0}, ["num_attention_heads", "at least 1"]),
    "odd_head_dim": ({"head_dim": 7}, ["head_dim", "even", "7"]),
    "window_zero": ({"sliding_window": 0}, ["sliding_window", "0"]),
    "no_layers": ({"num_hidden_layers": 0}, ["num_hidden_layers", "at least 1"]),
    "misspelt": ({"num_expert": 4}, ["num_expert'", "Did you mean 'num_experts'?"]),
    "generation_parameter": ({"top_k": 4}, ["top_k", "num_experts_per_tok"]),
    "shadows_a_method": ({"to_dict": 1}, ["to_dict", "method"]),
    "switches_the_checks_off": (
        {"__validators__": {}, "__class_validators__": [], "num_experts_per_tok": 0},
        ["__validators__", "constant of HfMoeConfig"],
    ),
    "renames_the_fields": ({"attribute_map": {"num_experts": "hidden_size"}}, ["attribute_map", "constant"]),
    "shadows_a_property": ({"can_skip_slots": False}, ["can_skip_slots", "constant"]),
    "old_dtype_not_a_dtype": ({"torch_dtype": "os"}, ["dtype", "bfloat16", "os"]),
    "attention_from_the_hub": ({"attn_implementation": "evil/repo"}, ["attn_implementation", "evil/repo", "Hub"]),
    "attention_from_the_hub_within": ({"_attn_implementation_internal": "evil/repo@main"}, ["evil/repo@main"]),
    "experts_from_the_hub": ({"experts_implementation": "evil/repo"}, ["experts_implementation", "evil/repo"]),
    "dtype_not_a_dtype": ({"dtype": "os"}, ["dtype", "bfloat16", "os"]),
    "labels_below_none": ({"num_labels": -3}, ["num_labels", "negative", "-3"]),
    "labels_of_a_bomb": ({"num_labels": 10**12}, ["num_labels", "131,072", ALLOW_HUGE]),
    "layers_of_a_bomb": ({"num_hidden_layers": 10**6}, ["num_hidden_layers", "1,024", ALLOW_HUGE]),
    "dense_layers_of_a_bomb": ({"mlp_only_layers": [0] * 2000}, ["mlp_only_layers", "1,024 entries", "2000"]),
    "window_beyond_int64": ({"sliding_window": 10**30}, ["sliding_window", "2147483648"]),
    "scale_that_overflows": ({"routed_scaling_factor": 1e308}, ["routed_scaling_factor", "10,000", "1e+308"]),
    "scale_no_float_holds": ({"routed_scaling_factor": 10**400}, ["routed_scaling_factor", "10,000"]),
    "dtype_a_number": ({"dtype": 10**30}, ["dtype", "bfloat16"]),
    "tuples_within": ({"return_dict": False}, ["return_dict must be true", "pass return_dict=False to the forward"]),
    "auto_map_a_number": ({"auto_map": {"AutoModel": 3}}, ["auto_map", "'module.Class'", "3"]),
    "auto_map_no_table": ({"auto_map": 3}, ["auto_map", "got 3"]),
    "padding_beyond_the_vocabulary": ({"pad_token_id": 64}, ["pad_token_id", "vocab_size (64)"]),
    "rope_theta_nan": ({"rope_parameters": {"rope_theta": NAN}}, ["rope_theta", "from 1e-06 to 1e+12", "nan"]),
    "rope_theta_negative": ({"rope_parameters": {"rope_theta": -1}}, ["rope_theta", "got -1"]),
    "rope_theta_text": ({"rope_parameters": {"rope_theta": "x"}}, ["rope_theta", "must be a number", "'x'"]),
    "rope_theta_beside": ({"rope_theta": NAN}, ["rope_theta", "nan"]),
    "rope_unknown": ({"rope_parameters": {"rope_type": "spiral"}}, ["rope_type", "linear", "yarn", "'spiral'"]),
    "rope_factor_zero": ({"rope_parameters": rope("linear", factor=0)}, ["factor", "got 0"]),
    "rope_factor_missing": ({"rope_parameters": rope("yarn")}, ["rope_parameters", "Missing required keys", "factor"]),
    "rope_factor_a_list": ({"rope_parameters": rope("linear", factor=[2.0])}, ["factor", "a number", "[2.0]"]),
    "rope_scaling_of_old": ({"rope_scaling": rope("linear", factor=INF)}, ["factor", "inf"]),
    "rope_context_of_one": (
        {"rope_parameters": rope("longrope", factor=2.0, original_max_position_embeddings=1)},
        ["original_max_position_embeddings", "at least 2"],
    ),
    "rope_factors_of_another_size": (
        {"rope_parameters": rope("longrope", factor=2.0, short_factor=[1.0], long_factor=[1.0] * 4)},
        ["short_factor", "4 numbers", "got 1"],
    ),
    "rope_by_layer_type": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["full_attention", "number"]),
    "layer_with_too_few_experts": ({"per_layer_config": {1: {"num_experts": 1}}}, ["num_experts_per_tok", "[1, 1]"]),
    "layer_changes_hidden_size": ({"per_layer_config": {1: {"hidden_size": 64}}}, ["per_layer_config", "hidden_size"]),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_with_value_rule_and_way_out(case):
    fields, needles = BAD[case]
    with pytest.raises((StrictDataclassError, ValueError)) as error:
        tiny_config(**fields)
    for needle in needles:
        assert needle in str(error.value)


@pytest.mark.parametrize("case", ["experts_per_token_above_experts", "aux_coefficient_nan", "unknown_routing"])
def test_a_bad_config_file_is_refused_on_loading(case, tmp_path):
    fields = tiny_config().to_dict() | BAD[case][0]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(StrictDataclassError, match=next(iter(BAD[case][0]))):
        AutoConfig.from_pretrained(tmp_path)


def test_huge_is_accepted_when_asked_for(monkeypatch):
    monkeypatch.setenv(ALLOW_HUGE, "1")
    assert tiny_config(vocab_size=10**13).vocab_size == 10**13


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_json_round_trip(name, tmp_path):
    config = tiny_config(**DECODERS[name]) if name in DECODERS else encoder_config(**ENCODERS[name])
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is HfMoeConfig
    read, written = again.to_dict(), config.to_dict()
    assert read.pop("_name_or_path") == str(tmp_path)
    written.pop("_name_or_path")
    assert read == written


def test_the_defaults_are_a_7b_a1b_model():
    config = HfMoeConfig()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active = total - experts * (1 - config.num_experts_per_tok / config.num_experts)
    assert 6.5e9 < total < 7.5e9
    assert 1e9 < active < 1.5e9
    norms = config.num_hidden_layers * (2 * config.hidden_size + 2 * config.head_dim) + config.hidden_size
    assert config._count_parameters() == total - norms


def test_host_aliases_and_unrelated_keys_pass():
    config = tiny_config(num_local_experts=8, task_specific_params={"a": 1}, num_labels=5)
    assert config.num_experts == 8
    assert config.num_labels == 5
    assert config.task_specific_params == {"a": 1}


def test_per_layer_values_reach_the_layers():
    config = tiny_config(per_layer_config={1: {"num_experts": 4}, 2: {"num_experts_per_tok": 1}})
    assert [layer.num_experts for layer in config.per_layer_config] == [8, 4, 8]
    assert [layer.num_experts_per_tok for layer in config.per_layer_config] == [2, 2, 1]
