"""Terms that cannot work are refused before training; biases follow the load; nothing else hears or pays for it."""

import gc
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from balanced_step import arguments, model_of, one_step, rows
from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.data.packing import PackedRows
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.layers.watch_routing import watch_routing
from hf_moe.training.balancing import bias_update
from hf_moe.training.balancing.bias_update import correction_bias, update_bias
from hf_moe.training.balancing.checks import BalancingError, balanced_layers
from hf_moe.training.balancing.mixin import BalancingCallback, BalancingConfig, BalancingMixin
from hf_moe.training.trainer import MoeTrainer
from tiny_models import build_tiny
from tiny_moe import hf_moe_model, qwen_model, with_expert_lora

AUX = BalancingConfig(aux_loss_coef=1.0)
BIAS = BalancingConfig(bias_update_rate=0.01)


def trainer_of(folder, model, balancing, batch_size=4, accumulation=1, trainer_class=MoeTrainer, **overrides):
    extra = {name: overrides.pop(name) for name in ("callbacks", "eval_dataset") if name in overrides}
    return trainer_class(
        model=model,
        args=arguments(folder, batch_size, accumulation, **overrides),
        train_dataset=rows(),
        balancing=balancing,
        **extra,
    )


def quiet_hf_moe(**overrides):
    return hf_moe_model(**{"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0, **overrides})


# ---- the config


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, "asks for nothing"),
        ({"aux_loss_coef": -0.1}, r"aux_loss_coef must be a finite number of at least 0, got -0\.1"),
        ({"z_loss_coef": float("nan")}, "z_loss_coef must be a finite number"),
        ({"bias_update_rate": "0.1"}, "bias_update_rate must be a finite number"),
        ({"aux_loss_coef": 1.0, "aux_loss_scope": "batch"}, "aux_loss_scope must be one of layer, global_batch"),
        ({"aux_loss_coef": 1.0, "scores": "relu"}, "scores must be None or one of softmax"),
    ],
)
def test_a_bad_config_is_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        BalancingConfig(**settings)


# ---- before training


def dense_model():
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    )


def bfloat16_bias():
    model = build_tiny("deepseek_v3")[0]
    for layer in moe_layers(model):
        layer.router.e_score_correction_bias = layer.router.e_score_correction_bias.bfloat16()
    return model


def own_loss(**overrides):
    model = qwen_model()
    for name, value in overrides.items():
        setattr(model.config, name, value)
    return model


REFUSED = {
    "dense": (dense_model, AUX, "has no MoE layer.*balancing=None"),
    "frozen": (lambda: frozen(qwen_model()), AUX, "the router of 'model.layers.0.mlp' is frozen"),
    "frozen_bias": (lambda: frozen(build_tiny("deepseek_v3")[0]), BIAS, "is frozen"),
    "expert_lora": (lambda: with_expert_lora(qwen_model()), AUX, "is frozen"),
    "no_bias": (qwen_model, BIAS, r"keeps no correction bias .*router_bias=True"),
    "bfloat16_bias": (bfloat16_bias, BIAS, "is torch.bfloat16, in which small updates round to nothing"),
    "all_experts": (lambda: quiet_hf_moe(routing="dense"), AUX, "the load does not depend on the router"),
    "own_loss": (
        lambda: own_loss(output_router_logits=True),
        AUX,
        r"Set model\.config\.router_aux_loss_coef = 0 ",
    ),
    "hf_moe_own_loss": (hf_moe_model, AUX, r"router_aux_loss_coef=0\.01"),
    "hf_moe_own_z_loss": (hf_moe_model, BalancingConfig(z_loss_coef=0.1), r"router_z_loss_coef=0\.001"),
}


def frozen(model):
    freeze_router(model)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_when_the_trainer_is_built(case, tmp_path):
    build, balancing, problem = REFUSED[case]
    with pytest.raises(BalancingError, match=problem):
        trainer_of(tmp_path, build(), balancing)


def test_what_does_not_conflict_is_accepted():
    balanced_layers(own_loss(output_router_logits=True, router_aux_loss_coef=0.0), AUX)
    balanced_layers(own_loss(output_router_logits=False), AUX)
    balanced_layers(own_loss(output_router_logits=True), BalancingConfig(z_loss_coef=0.1))
    balanced_layers(quiet_hf_moe(routing="dense"), BalancingConfig(z_loss_coef=0.1))
    balanced_layers(hf_moe_model(router_bias=True), BIAS)


def test_a_router_that_is_frozen_after_the_trainer_was_built_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, qwen_model(), AUX)
    freeze_router(trainer.model)
    with pytest.raises(BalancingError, match="is frozen"):
        trainer.train()


def test_detached_logits_are_refused(tmp_path):
    model = qwen_model()

    def detach(module, args, output):
        return (output[0].detach(), *output[1:])

    model.model.layers[1].mlp.gate.register_forward_hook(detach)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(BalancingError, match=r"logits of layer 'model.layers.1.mlp' have no gradient to the router"):
        trainer_of(tmp_path, model, AUX).train()
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_logits_with_a_gradient_that_misses_the_router_are_refused(tmp_path):
    model = qwen_model()
    gate = model.model.layers[1].mlp.gate

    def other_weight(module, args, output):
        logits = args[0].reshape(-1, 32) @ gate.weight.detach().T
        return (logits, *output[1:])

    gate.register_forward_hook(other_weight)
    with pytest.raises(BalancingError, match="have no gradient to the router"):
        trainer_of(tmp_path, model, AUX).train()


def test_a_saturated_router_is_found_in_the_first_steps(tmp_path):
    """Probabilities of exactly 0 and 1: the loss is there, its gradient is not."""
    model = qwen_model()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.mul_(1e6)
    trainer = trainer_of(tmp_path, model, AUX, max_steps=8, learning_rate=0.0)
    with pytest.raises(BalancingError, match=r"aux_loss sent no gradient to the router of layer 'model.layers.1.mlp'"):
        trainer.train()
    assert trainer.state.global_step < 8


def test_a_reentrant_layer_that_no_gradient_reaches_is_found_in_the_first_step(tmp_path):
    """torch only warns: the parameters of a layer whose input has no gradient are not trained at all."""
    model = qwen_model()
    model.model.embed_tokens.requires_grad_(False)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = trainer_of(tmp_path, model, AUX, **options)
    model.enable_input_require_grads = lambda: None  # the Trainer calls it
    with pytest.raises(BalancingError, match=r"did not run layer 'model.layers.0.mlp' again"):
        trainer.train()


def test_detached_logits_in_a_reentrant_layer_are_refused(tmp_path):
    model = qwen_model()
    gate = model.model.layers[1].mlp.gate
    gate.register_forward_hook(lambda module, args, output: (output[0].detach(), *output[1:]))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(BalancingError, match=r"logits of layer 'model.layers.1.mlp' have no gradient to the router"):
        trainer_of(tmp_path, model, AUX, **options).train()


# ---- the bias update


def counts_by_layer(model, batch):
    events = []
    with torch.no_grad(), watch_routing(model, events.append):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    is_token = batch["attention_mask"].flatten().bool()
    return {event.layer.name: torch.bincount(event.index[is_token].flatten(), minlength=8) for event in events}


@pytest.mark.parametrize(
    ("family", "reentrant"),
    [
        ("deepseek_v3", None),
        ("deepseek_v3", False),
        ("deepseek_v3", True),
        ("minimax_m2", True),
        ("ernie4_5_moe", None),
    ],
)
def test_the_bias_follows_the_load_of_the_optimizer_step(family, reentrant, tmp_path, monkeypatch):
    """Two micro-batches, one update; padding counts nowhere; recomputation counts once."""
    model = build_tiny(family)[0]
    table = {name: torch.stack([row[name] for row in rows()]) for name in rows()[0]}
    counts = counts_by_layer(model.train(), table)
    before = {layer.name: correction_bias(model, layer)[1].clone().view(-1) for layer in moe_layers(model)}
    used = []
    monkeypatch.setattr(
        bias_update, "update_bias", lambda bias, load, *rest: (used.append(load), update_bias(bias, load, *rest))
    )
    options = {}
    if reentrant is not None:
        model.enable_input_require_grads()
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    trainer_of(tmp_path, model, BIAS, accumulation=2, learning_rate=0.0, **options).train()
    for layer, found in zip(moe_layers(model), used, strict=True):
        assert torch.equal(found, counts[layer.name])
        load = counts[layer.name].double()
        expected = 0.01 * torch.sign(load.mean() - load).float()
        torch.testing.assert_close(correction_bias(model, layer)[1].view(-1) - before[layer.name], expected)


def test_null_experts_keep_their_bias():
    bias = torch.zeros(6)
    update_bias(bias, torch.tensor([5, 1, 3, 3, 9, 0]), 0.5, num_experts=4)
    assert bias.tolist() == [-0.5, 0.5, 0.0, 0.0, 0.0, 0.0]


def test_the_bias_of_a_trained_copy_is_the_one_in_use():
    model = build_tiny("deepseek_v3")[0]
    adapted = get_peft_model(model, LoraConfig(target_modules=["o_proj"], modules_to_save=["gate"]))
    for layer in balanced_layers(adapted, BIAS):
        name, bias = correction_bias(adapted, layer)
        assert ".modules_to_save.default." in name
        assert bias is layer.router.modules_to_save["default"].e_score_correction_bias


def test_a_bias_that_an_adapter_would_not_save_is_refused():
    model = build_tiny("minimax_m2")[0]  # keeps it on the block
    adapted = get_peft_model(model, LoraConfig(target_modules=["o_proj"], modules_to_save=["gate"]))
    with pytest.raises(BalancingError, match="an adapter would be saved without"):
        balanced_layers(adapted, BIAS)


@pytest.mark.parametrize("family", ["hf_moe", "deepseek_v3"])
def test_the_bias_is_saved_and_resumed_bit_by_bit(family, tmp_path):
    def model():
        return quiet_hf_moe(router_bias=True) if family == "hf_moe" else build_tiny(family)[0]

    def run(resume=None):
        config = BalancingConfig(aux_loss_coef=0.01, bias_update_rate=0.013)
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-2}
        trainer = trainer_of(tmp_path, model(), config, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, resumed = run(), run(str(tmp_path / "checkpoint-3"))
    for (name, expected), actual in zip(
        whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(actual, expected), name
    biases = [correction_bias(whole.model, layer)[1] for layer in moe_layers(whole.model)]
    assert any(bias.any() for bias in biases)
    logs = [[log for log in t.state.log_history if "loss" in log] for t in (whole, resumed)]
    assert logs[0] == logs[1]
    assert logs[0][-1]["moe/bias_range"] == pytest.approx(max(float(b.max() - b.min()) for b in biases))


def test_the_callback_updates_biases_under_the_plain_trainer(tmp_path):
    by_callback, by_trainer = build_tiny("deepseek_v3")[0], build_tiny("deepseek_v3")[0]
    Trainer(
        by_callback, arguments(tmp_path, 4, 1, max_steps=3), train_dataset=rows(), callbacks=[BalancingCallback(BIAS)]
    ).train()
    trainer_of(tmp_path, by_trainer, BIAS, max_steps=3).train()
    for layers in zip(moe_layers(by_callback), moe_layers(by_trainer), strict=True):
        mine, other = correction_bias(by_callback, layers[0])[1], correction_bias(by_trainer, layers[1])[1]
        assert mine.any()
        assert torch.equal(mine, other)
    assert not any(module._forward_pre_hooks for module in by_callback.modules())


def test_a_callback_for_a_loss_is_refused():
    with pytest.raises(ValueError, match="a callback cannot add a loss"):
        BalancingCallback(BalancingConfig(aux_loss_coef=0.1, bias_update_rate=0.1))


# ---- what else runs


def test_evaluation_is_the_task_alone(tmp_path):
    """And it neither counts for the biases nor for the log."""
    with_terms, without = (
        trainer_of(
            tmp_path,
            build_tiny("deepseek_v3")[0],
            balancing,
            eval_dataset=rows(same=True),
            eval_strategy="steps",
            eval_steps=1,
            learning_rate=0.0,
        )
        for balancing in (BalancingConfig(aux_loss_coef=5.0, z_loss_coef=5.0), None)
    )
    logs = []
    for trainer in (with_terms, without):
        trainer.train()
        logs.append({name: value for log in trainer.state.log_history for name, value in log.items()})
    assert logs[0]["eval_loss"] == logs[1]["eval_loss"]
    assert logs[0]["moe/max_violation"] == logs[1]["moe/max_violation"]
    terms = 5 * (logs[0]["moe/aux_loss"] + logs[0]["moe/z_loss"])
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"] + terms, rel=1e-5)
    assert "moe/aux_loss" not in logs[1]
    assert not any(name.startswith("eval_moe") for name in logs[0])


class ReferenceTrainer(Trainer):
    """A second forward of the same model without gradients, as preference losses have."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            model(input_ids=inputs["input_ids"].flip(1))
        return super().compute_loss(model, inputs, *args, **kwargs)


class BalancedReferenceTrainer(BalancingMixin, ReferenceTrainer):
    pass


def test_a_reference_forward_does_not_count(tmp_path):
    config = BalancingConfig(aux_loss_coef=1.0, z_loss_coef=1.0, bias_update_rate=0.01)
    models = [build_tiny("deepseek_v3")[0] for _ in range(2)]
    for model, trainer_class in zip(models, (MoeTrainer, BalancedReferenceTrainer), strict=True):
        trainer_of(tmp_path, model, config, trainer_class=trainer_class).train()
    for (name, expected), actual in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(actual, expected), name


def test_two_forwards_of_a_loss_are_one_batch(tmp_path):
    """Both halves of the rows, in two forwards of one compute_loss: the terms are those of all rows together."""

    class HalvesTrainer(Trainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
            halves = [{name: value[part] for name, value in inputs.items()} for part in (slice(0, 4), slice(4, 8))]
            return sum(model(**half, num_items_in_batch=num_items_in_batch).loss for half in halves)

    class Balanced(BalancingMixin, HalvesTrainer):
        pass

    config = BalancingConfig(aux_loss_coef=1.0, z_loss_coef=1.0)
    whole, halves = model_of("qwen3_moe"), model_of("qwen3_moe")
    trainer_of(tmp_path, whole, config, batch_size=8).train()
    trainer_of(tmp_path, halves, config, batch_size=8, trainer_class=Balanced).train()
    for (name, expected), actual in zip(whole.named_parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_the_graph_of_a_micro_batch_is_let_go(tmp_path):
    model, graphs = qwen_model(), []
    model.model.layers[0].mlp.gate.register_forward_hook(
        lambda module, args, output: graphs.append(weakref.ref(output[0]))
    )
    trainer = trainer_of(tmp_path, model, AUX, max_steps=2)
    alive = []
    step = trainer.training_step

    def spy(*args, **kwargs):
        loss = step(*args, **kwargs)
        gc.collect()
        alive.append(graphs[-1]() is not None)
        return loss

    trainer.training_step = spy
    trainer.train()
    assert alive == [False, False]


def test_no_hook_stays_behind_a_training_that_failed(tmp_path):
    model = qwen_model()
    trainer = trainer_of(tmp_path, model, AUX)
    trainer.compute_loss = None
    with pytest.raises(TypeError):
        trainer.train()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_batches_that_do_not_tell_their_tokens_count_alike(tmp_path):
    """Inputs without ids: equal shares, which for rows without padding is the same."""

    class Renamed(MoeTrainer):
        def get_batch_samples(self, *args, **kwargs):
            samples, items = super().get_batch_samples(*args, **kwargs)
            self._step_tokens = None
            return samples, items

    config = BalancingConfig(aux_loss_coef=1.0, z_loss_coef=1.0, aux_loss_scope="layer")
    models = [model_of("qwen3_moe") for _ in range(2)]
    for model, trainer_class in zip(models, (MoeTrainer, Renamed), strict=True):
        trainer_class(
            model=model, args=arguments(tmp_path, 2, 4), train_dataset=rows(same=True), balancing=config
        ).train()
    for expected, actual in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(actual, expected)


def test_autocast_computes_the_terms_in_float32(tmp_path):
    trainer, _ = one_step(tmp_path, "deepseek_v3", 8, 1, {"aux_loss_coef": 1.0, "z_loss_coef": 1.0})
    expected = next(log for log in trainer.state.log_history if "loss" in log)
    trainer = trainer_of(
        tmp_path, build_tiny("deepseek_v3")[0], BalancingConfig(aux_loss_coef=1.0, z_loss_coef=1.0), 8, bf16=True
    )
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    # bfloat16 in the layers below moves a few choices
    assert log["moe/aux_loss"] == pytest.approx(expected["moe/aux_loss"], rel=0.05)
    assert log["moe/z_loss"] == pytest.approx(expected["moe/z_loss"], rel=0.05)


@pytest.mark.slow
def test_a_compiled_model_is_balanced_as_it_is(tmp_path):
    balancing = {"aux_loss_coef": 1.0, "z_loss_coef": 0.3, "bias_update_rate": 0.01}
    plain, expected = one_step(tmp_path, "hf_moe, one layer", 8, 1, balancing)
    compiled, actual = one_step(
        tmp_path, "hf_moe, one layer", 8, 1, balancing, torch_compile=True, torch_compile_backend="eager"
    )
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-6, atol=1e-7)
    for (name, bias), other in zip(plain.model.named_buffers(), compiled.model.buffers(), strict=True):
        assert torch.equal(bias, other), name


def test_trl_trainer_with_the_mixin(tmp_path):
    trl = pytest.importorskip("trl")
    from tiny_moe import tiny_tokenizer

    class BalancedSFTTrainer(BalancingMixin, trl.SFTTrainer):
        pass

    tokenizer = tiny_tokenizer()
    model = build_tiny("deepseek_v3", vocab_size=len(tokenizer))[0]
    trainer = BalancedSFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path),
            max_length=16,
            packing=False,
            eos_token=tokenizer.eos_token,
            dataset_num_proc=None,
            **{
                name: getattr(arguments(tmp_path, 4, 2, max_steps=2), name)
                for name in ("max_steps", "gradient_accumulation_steps", "use_cpu", "disable_tqdm", "logging_steps")
            },
            per_device_train_batch_size=4,
            report_to="none",
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=text_dataset(),
        processing_class=tokenizer,
        balancing=BalancingConfig(aux_loss_coef=0.01, z_loss_coef=0.001, bias_update_rate=0.01),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2
    for log in logs:
        assert {"moe/aux_loss", "moe/z_loss", "moe/bias_range"} <= log.keys()


def text_dataset():
    from datasets import Dataset

    from tiny_moe import words

    return Dataset.from_dict({"text": [words(12, seed) for seed in range(16)]})


# ---- the case that the loss of transformers cannot see


def collapsed_model():
    """Layer 0 sends every token to experts 0 and 1, layer 1 to 2 and 3: a constant in the embedding does it."""
    model = quiet_hf_moe(num_hidden_layers=2, num_experts=4)
    with torch.no_grad():
        model.model.embed_tokens.weight += 1.0
        for number, layer in enumerate(moe_layers(model)):
            layer.router.weight[2 * number : 2 * number + 2] += 0.05
    return model


def worst_violation(model):
    ids = torch.stack([row["input_ids"] for row in rows(same=False)])
    events = []
    with torch.no_grad(), watch_routing(model.eval(), events.append):
        model(input_ids=ids)
    loads = [torch.bincount(event.index.flatten(), minlength=4).double() for event in events]
    pooled = load_balancing_loss_func(tuple(event.logits for event in events), 4, 2)
    return [float(load.max() / load.mean() - 1) for load in loads], float(pooled) / 2


def test_layers_that_collapsed_each_onto_its_own_experts_are_repaired(tmp_path):
    model = collapsed_model()
    violation, pooled = worst_violation(model)
    assert violation == [1.0, 1.0]  # two of four experts take all
    assert pooled == pytest.approx(1.0, abs=0.02)  # transformers' loss, over its balanced value: perfect
    trainer = MoeTrainer(
        model=model,
        args=arguments(tmp_path, 8, 1, max_steps=80, learning_rate=2e-2, optim="adamw_torch", logging_steps=80),
        train_dataset=PackedRows(torch.stack([row["input_ids"] for row in rows()]).int()),
        balancing=BalancingConfig(aux_loss_coef=1.0),
    )
    trainer.train()
    violation, _ = worst_violation(model)
    assert max(violation) < 0.5
