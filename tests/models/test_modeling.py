"""What users expect of any transformers model, for every option of the architecture."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GenerationConfig,
    StaticCache,
)
from transformers.utils import find_labels

from hf_moe.models.modeling_hf_moe import (
    CACHE,
    HfMoeForCausalLM,
    HfMoeForQuestionAnswering,
    HfMoeForSequenceClassification,
    HfMoeForTokenClassification,
    HfMoeModel,
    HfMoeRouter,
)
from tiny_hf_moe import DECODERS, ENCODERS, VOCAB, encoder_config, left_padded, random_ids, tiny_config

HEADS = {
    AutoModel: HfMoeModel,
    AutoModelForCausalLM: HfMoeForCausalLM,
    AutoModelForSequenceClassification: HfMoeForSequenceClassification,
    AutoModelForTokenClassification: HfMoeForTokenClassification,
    AutoModelForQuestionAnswering: HfMoeForQuestionAnswering,
}
# float32 kernels that add in another order: a few ulp of logits of size about 0.3
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def build(name: str = "top_k", auto_class=AutoModelForCausalLM, **options):
    torch.manual_seed(0)
    config = encoder_config(**ENCODERS[name]) if name in ENCODERS else tiny_config(**DECODERS[name])
    return auto_class.from_config(config, **options).eval()


def gradients(model, **inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)  # jitter
    model(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def head_labels(auto_class, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    rows = torch.arange(ids.shape[0])
    return {
        AutoModel: {},
        AutoModelForCausalLM: {"labels": ids},
        AutoModelForSequenceClassification: {"labels": rows % 2},
        AutoModelForTokenClassification: {"labels": ids % 2},
        AutoModelForQuestionAnswering: {"start_positions": rows, "end_positions": rows + 1},
    }[auto_class]


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__)
@pytest.mark.parametrize("name", ["top_k", "sigmoid_groups_bias", "bidirectional", "expert_choice"])
def test_every_head_trains_every_parameter(auto_class, name):
    if auto_class is AutoModelForCausalLM and name in ENCODERS:
        with pytest.raises(ValueError, match=r"needs is_causal=True.*routing="):
            build(name, auto_class)
        return
    model = build(name, auto_class).train()
    assert type(model) is HEADS[auto_class]
    ids, mask = left_padded(random_ids(), 3)
    outputs = model(input_ids=ids, attention_mask=mask, **head_labels(auto_class, ids))
    loss = outputs.last_hidden_state.square().mean() if auto_class is AutoModel else outputs.loss
    loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    if auto_class is not AutoModel:
        assert outputs.aux_loss > 0
        assert outputs.z_loss > 0


@pytest.mark.parametrize("auto_class", HEADS, ids=lambda auto_class: auto_class.__name__)
def test_the_trainer_finds_the_labels_and_the_loss_first(auto_class):
    expected = sorted(head_labels(auto_class, random_ids()), reverse=True)
    assert find_labels(HEADS[auto_class]) == expected
    outputs = build(auto_class=auto_class)(random_ids(), **head_labels(auto_class, random_ids()), use_cache=False)
    first = ["loss", *(["start_logits", "end_logits"] if "start_positions" in expected else ["logits"])]
    assert list(outputs) == (first if expected else ["last_hidden_state"])


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_implementations_agree(name, implementation):
    ids, mask = left_padded(random_ids(), 3)
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    expected = build(name, experts_implementation="eager").train()
    actual = build(name, experts_implementation=implementation).train()
    assert actual.get_experts_implementation() == {"": implementation}
    expected_gradients, actual_gradients = gradients(expected, **inputs), gradients(actual, **inputs)
    for parameter in expected_gradients:
        torch.testing.assert_close(actual_gradients[parameter], expected_gradients[parameter], **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_set_experts_implementation_reaches_every_layer(name):
    model = build(name, experts_implementation="eager")
    ids = random_ids()
    before = model(ids).logits
    model.set_experts_implementation("batched_mm")
    blocks = [module for module in model.modules() if type(module).__name__ == "HfMoeExperts"]
    assert {block.config._experts_implementation for block in blocks} == {"batched_mm"}
    torch.testing.assert_close(model(ids).logits, before, **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_with_a_cache_is_decoding_without(name):
    model = build(name)
    ids, mask = left_padded(random_ids(), 3)
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    cached = model.generate(ids, **options)
    plain = model.generate(ids, use_cache=False, **options)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plain.logits), **CLOSE)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(plain.logits), **CLOSE)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generated_tokens_are_those_without_a_cache(options):
    model = build()
    ids, mask = left_padded(random_ids(), 3)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, **options}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*past_key_values")
        tokens = model.generate(ids, **options)
    assert torch.equal(tokens, model.generate(ids, use_cache=False, **options))


@pytest.mark.slow
def test_continuous_batching_gives_the_same_tokens():
    model = build(attn_implementation="sdpa")
    prompts = [row[: 4 + length].tolist() for length, row in enumerate(random_ids())]
    options = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [
        model.generate(torch.tensor([prompt]), generation_config=options)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    outputs = model.generate_batch(prompts, generation_config=options)
    assert [output.generated_tokens for output in outputs.values()] == expected


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}, {"num_beams": 2, "do_sample": True}])
def test_sampling_and_beam_search(options):
    model = build()
    tokens = model.generate(random_ids(), max_new_tokens=5, **options)
    assert tokens.shape == (2, 17)


def test_static_cache_object():
    model = build()
    ids = random_ids()
    cache = StaticCache(config=model.config, max_cache_len=32)
    torch.testing.assert_close(model(ids, **{CACHE: cache}).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", [name for name in DECODERS if not name.startswith("capacity")])
def test_left_padding_changes_nothing(name):
    model = build(name)
    ids = random_ids()
    padded, mask = left_padded(ids, 5)
    logits = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(logits[:, 5:], model(ids).logits, **CLOSE)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_padding_changes_nothing(name, monkeypatch):
    """Experts that choose tokens never take padding, on either side; their capacity counts all rows, so cap both."""
    model = build(name, AutoModel)
    for module in ("routing", "modeling_hf_moe"):
        monkeypatch.setattr(f"hf_moe.models.{module}.expert_capacity", lambda num_tokens, num_experts, config: 4)
    ids = random_ids()
    padded, mask = left_padded(ids, 5)
    hidden = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).last_hidden_state
    torch.testing.assert_close(hidden[:, 5:], model(ids).last_hidden_state, **CLOSE)


def test_four_dimensional_mask():
    model = build(attn_implementation="sdpa")
    ids = random_ids()
    causal = torch.ones(12, 12).tril().bool()
    two_documents = causal & (torch.arange(12)[:, None] // 6 == torch.arange(12)[None] // 6)
    logits = model(ids, attention_mask=two_documents.expand(2, 1, 12, 12)).logits
    positions = torch.arange(12)[None]
    alone = model(ids[:, 6:], position_ids=positions[:, 6:]).logits
    torch.testing.assert_close(logits[:, 6:], alone, **CLOSE)
    model.train()(ids, attention_mask=two_documents.expand(2, 1, 12, 12), labels=ids).loss.backward()


def test_causality():
    model = build()
    ids = random_ids()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] % (VOCAB - 1)) + 1
    torch.testing.assert_close(model(changed).logits[:, :-1], model(ids).logits[:, :-1], **CLOSE)
    encoder = build("bidirectional", AutoModel)
    difference = (encoder(changed).last_hidden_state - encoder(ids).last_hidden_state)[:, 0].abs().max()
    assert difference > 1e-4


@torch.no_grad()  # flex attention has no backward on CPU
@pytest.mark.parametrize("name", ["top_k", "sliding_window", "bidirectional"])
def test_attention_implementations_agree(name):
    auto_class = AutoModel if name in ENCODERS else AutoModelForCausalLM
    ids, mask = left_padded(random_ids(), 3)
    kept = mask.bool()
    eager, sdpa, flex = (
        build(name, auto_class, attn_implementation=attention)(ids, attention_mask=mask)[0][kept]
        for attention in ("eager", "sdpa", "flex_attention")
    )
    torch.testing.assert_close(sdpa, eager, **CLOSE)
    torch.testing.assert_close(flex, eager, **CLOSE)


@pytest.mark.parametrize("name", DECODERS)
def test_gradient_checkpointing_is_exact(name):
    model = build(name).train()
    ids = random_ids()
    expected = gradients(model, input_ids=ids, labels=ids)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    actual = gradients(model, input_ids=ids, labels=ids)
    for parameter in expected:
        torch.testing.assert_close(actual[parameter], expected[parameter], atol=0, rtol=0)


def loud(name: str, auto_class=AutoModelForCausalLM, **config):
    """In float64, with balancing losses as large as the task's."""
    torch.manual_seed(0)
    options = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
    config = (DECODERS | ENCODERS)[name] | options | config
    config = encoder_config(**config) if name in ENCODERS else tiny_config(**config)
    return auto_class.from_config(config, experts_implementation="eager").double().train()


def checkpointed_by(function):
    """A checkpoint function that does not tell what it wraps."""
    return lambda *args, **kwargs: function(*args, **kwargs)


def assert_gradients(actual, expected):
    assert actual.keys() == expected.keys()
    for parameter, value in expected.items():
        torch.testing.assert_close(actual[parameter], value, atol=1e-14, rtol=1e-10)


@pytest.mark.parametrize("wrapped", [False, True], ids=["partial", "wrapped"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_the_balancing_gradient_survives_checkpointing(name, reentrant, wrapped):
    """Reentrant as well: its first run of a layer has no gradients."""
    auto_class = AutoModelForSequenceClassification if name in ENCODERS else AutoModelForCausalLM
    model = loud(name, auto_class)
    ids, mask = left_padded(random_ids(), 3)
    inputs = {"input_ids": ids, "attention_mask": mask, **head_labels(auto_class, ids)}
    expected = gradients(model, **inputs)
    values = model(**inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if wrapped:
        for layer in model.model.layers:
            layer._gradient_checkpointing_func = checkpointed_by(layer._gradient_checkpointing_func)
    assert_gradients(gradients(model, **inputs), expected)
    if name != "jitter":
        again = model(**inputs)
        for field in ("loss", "aux_loss", "z_loss"):
            torch.testing.assert_close(again[field], values[field], atol=0, rtol=1e-12)
    model.zero_grad()
    model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.0
    without = gradients(model, **inputs)
    assert any(not torch.allclose(without[parameter], value) for parameter, value in expected.items())


@pytest.mark.parametrize("scope", ["layer", "global_batch"])
def test_reentrant_checkpointing_with_accumulation(scope):
    """Micro-batches of a step; each loss scaled, and one of them used in two forwards before one backward."""

    def step(**checkpointing):
        model = loud("top_k", balance_scope=scope)
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        ids = random_ids()
        rows = [ids[:1], ids[1:]]
        items = ids[:, 1:].numel()
        first, second = (model(row, labels=row, num_items_in_batch=items) for row in rows)
        (1024 * (first.loss + 3 * second.aux_loss + second.loss)).backward()
        model(rows[0], labels=rows[0], num_items_in_batch=items).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    assert_gradients(step(use_reentrant=True), step())


def test_reentrant_checkpointing_where_the_loss_is_of_an_early_layer():
    def step(**checkpointing):
        model = loud("top_k")
        if checkpointing:
            model.gradient_checkpointing_enable(checkpointing)
        model(random_ids(), output_hidden_states=True).hidden_states[1].square().mean().backward()
        return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}

    assert_gradients(step(use_reentrant=True), step())


def test_reentrant_checkpointing_of_some_layers_and_without_the_task():
    """Layers in between run as they are; router logits have gradients outside; a second backward starts over."""

    def step(every):
        model = loud("sigmoid_groups_bias")
        if every:
            model.gradient_checkpointing_enable({"use_reentrant": True})
            for layer in model.model.layers[::every]:
                layer.gradient_checkpointing = False
        outputs = model(random_ids(), output_router_logits=True)
        loss = outputs.aux_loss + sum(logits.square().mean() for logits in outputs.router_logits)
        loss.backward(retain_graph=True)
        loss.backward()
        parameters = model.model.named_parameters()
        return {name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in parameters}

    assert_gradients(step(2), step(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["top_k", "sigmoid_groups_bias", "top_p", "null_experts", "capacity_probability"])
def test_torch_compile_full_graph(name):
    model = build(name, experts_implementation="grouped_mm").train()
    ids = random_ids()
    expected = gradients(model, input_ids=ids, labels=ids)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    compiled.zero_grad()
    compiled(input_ids=ids, labels=ids).loss.backward()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(compiled._orig_mod.get_parameter(parameter).grad, gradient, **CLOSE)


@pytest.mark.slow
def test_torch_compile_full_graph_encoder():
    model = build("expert_choice", AutoModel, experts_implementation="grouped_mm")
    ids = random_ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).last_hidden_state, model(ids).last_hidden_state, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["top_k", "sigmoid_groups_bias", "null_experts"])
def test_dtypes(dtype, name):
    # float64 rows are refused by transformers' grouped_mm on CPU
    model = build(name, experts_implementation="eager").to(dtype).train()
    ids = random_ids()
    outputs = model(ids, labels=ids, output_router_logits=True)
    assert outputs.logits.dtype == dtype
    assert outputs.router_logits[0].dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_router_stays_in_float32_under_autocast():
    model = build().train()
    ids = random_ids()
    plain = model(ids, output_router_logits=True).router_logits[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(ids, labels=ids, output_router_logits=True)
    assert outputs.router_logits[0].dtype == torch.float32
    torch.testing.assert_close(outputs.router_logits[0], plain, atol=5e-3, rtol=0)  # attention ran in bfloat16
    outputs.loss.backward()


def test_selection_bias_stays_float32_when_loaded_in_half(tmp_path):
    model = build("sigmoid_groups_bias")
    for module in model.modules():
        if isinstance(module, HfMoeRouter):
            module.e_score_correction_bias += torch.randn(8)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    pairs = zip(model.model.layers, again.model.layers, strict=True)
    for before, after in pairs:
        assert after.mlp.gate.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(before.mlp.gate.e_score_correction_bias, after.mlp.gate.e_score_correction_bias)
    assert again.lm_head.weight.dtype == torch.bfloat16


def test_device_map_auto_and_offload(tmp_path):
    expected = build()
    expected.save_pretrained(tmp_path / "model")
    auto = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    split = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        | {"model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )
    ids = random_ids()
    for model in (auto, split):
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, **CLOSE)


def test_tied_and_resized_embeddings():
    tied, untied = build("tied"), build()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight
    for model in (tied, untied):
        model.resize_token_embeddings(VOCAB + 8)
        assert model.config.vocab_size == VOCAB + 8
        ids = torch.full((1, 4), VOCAB + 7)
        assert model(ids, labels=ids).logits.shape == (1, 4, VOCAB + 8)


def test_outputs_that_are_asked_for():
    model = build("shared_and_dense", attn_implementation="eager")
    outputs = model(
        random_ids(), output_hidden_states=True, output_attentions=True, output_router_logits=True, use_cache=True
    )
    assert len(outputs.hidden_states) == 4
    assert len(outputs.attentions) == 3
    assert [logits.shape for logits in outputs.router_logits] == [(24, 8)]  # one sparse layer of three
    assert outputs.aux_loss is not None
    assert outputs[CACHE] is not None
    plain = model(random_ids())
    assert plain.router_logits is None
    assert plain.aux_loss is None
    last = model(random_ids(), logits_to_keep=1).logits
    torch.testing.assert_close(last, plain.logits[:, -1:], **CLOSE)
    assert isinstance(model(random_ids(), return_dict=False), tuple)


def test_generate_with_router_logits_in_the_config():
    """The loss of transformers breaks here: the mask covers the cache, the router only the new token."""
    model = build()
    model.config.output_router_logits = True
    ids, mask = left_padded(random_ids(), 3)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=4).shape == (2, 19)


def test_inputs_embeds():
    model = build()
    ids = random_ids()
    embeds = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits, **CLOSE)
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one"):
        model()


def test_a_cache_without_causality_is_refused():
    with pytest.raises(ValueError, match=r"is_causal=False.*use_cache=False"):
        build("bidirectional", AutoModel)(random_ids(), use_cache=True)


def test_a_config_changed_after_its_checks_is_refused(tmp_path):
    config = tiny_config()
    config.num_experts_per_tok = 99
    with pytest.raises(ValueError, match=r"num_experts_per_tok.*99"):
        AutoModelForCausalLM.from_config(config)
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"num_experts_per_tok.*99"):
        AutoModelForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=99)


@pytest.mark.parametrize("padding", ["mask", "pad_token_id", "none"])
def test_sequence_classification_reads_the_last_real_token(padding):
    model = build(auto_class=AutoModelForSequenceClassification)
    ids = random_ids()
    expected = model(ids).logits
    right = torch.cat([ids, torch.zeros_like(ids[:, :4])], 1)
    if padding == "mask":
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(ids[:, :4])], 1)
        torch.testing.assert_close(model(right, attention_mask=mask).logits, expected, **CLOSE)
    elif padding == "pad_token_id":
        torch.testing.assert_close(model(right).logits, expected, **CLOSE)
    else:
        model.config.pad_token_id = None
        with pytest.raises(ValueError, match=r"attention_mask.*pad_token_id"):
            model(right)
        assert model(ids[:1]).logits.shape == (1, 2)


def test_weights_are_initialised():
    model = build("sigmoid_groups_bias")
    std = model.config.initializer_range
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(std, rel=0.35), name
    biases = [buffer for name, buffer in model.named_buffers() if "correction_bias" in name]
    assert len(biases) == 3
    assert all((bias == 0).all() for bias in biases)


def test_parallel_plans_name_what_exists():
    """Every entry of a plan matches a module or parameter: after a renaming it would do nothing, silently."""
    names: set[str] = set()
    for name in ("shared_and_dense", "top_k"):
        model = build(name, AutoModel)
        names |= {entry for entry, _ in model.named_modules()} | {entry for entry, _ in model.named_parameters()}
    generic = {".".join("*" if part.isdigit() else part for part in entry.split(".")) for entry in names}
    config = tiny_config()
    for plan in (config.base_model_tp_plan, config.base_model_ep_plan, config.base_model_pp_plan):
        assert set(plan) <= generic
    assert isinstance(build().lm_head, nn.Linear)
