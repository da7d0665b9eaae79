"""What TRL does to the loss of a Mixture-of-Experts, and what is done about it, as `finetuning/trl.py` says."""

import copy

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("trl", reason="needs TRL: pip install hf-moe[trl]")

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hf_moe.adapters.expert_lora import accelerate_adapters, expert_lora_config
from hf_moe.adapters.frozen_router import RouterNotFrozenError, freeze_router
from hf_moe.finetuning.trl import (
    DpoArguments,
    MoeSFTTrainer,
    SafeSFTTrainer,
    SftArguments,
    SFTTrainer,
)
from hf_moe.training.balancing.mixin import BalancingConfig, BalancingError, BalancingMixin
from hf_moe.training.callbacks import RouterFreezeCallback
from tiny_moe import MODELS, tiny_tokenizer, words


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def data():
    return Dataset.from_list([{"text": words(20, seed)} for seed in range(4)])


def build(family, tokenizer, **overrides):
    if family == "qwen3_moe":
        model = MODELS[family]()
        model.resize_token_embeddings(len(tokenizer))
        for name, value in overrides.items():
            setattr(model.config, name, value)
            setattr(model, name, value)  # native classes copy the coefficient when they are built
        return model
    return MODELS[family](vocab_size=len(tokenizer), max_position_embeddings=64, **overrides)


def trainer_for(kind, model, tokenizer, data, folder, **options):
    arguments = SftArguments(
        str(folder), use_cpu=True, bf16=False, max_length=32, gradient_checkpointing=False, disable_tqdm=True,
        per_device_train_batch_size=4, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    made = kind(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    made.model.train()
    return made


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def cross_entropy(model, batch):
    """By the definition, from the logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten(), ignore_index=-100)


@pytest.mark.parametrize("family", MODELS)
def test_with_a_frozen_router_nothing_of_the_loss_is_lost(family, tokenizer, data, tmp_path):
    from peft import get_peft_model

    model = build(family, tokenizer)
    freeze_router(model)
    model = get_peft_model(model, expert_lora_config(model, r=2))
    accelerate_adapters(model)
    trainer = trainer_for(SFTTrainer, model, tokenizer, data, tmp_path)
    batch = batch_of(trainer)
    own = model(**copy.deepcopy(batch)).loss
    own.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = trainer.compute_loss(model, copy.deepcopy(batch))
    loss.backward()
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss.double(), cross_entropy(model, batch), rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_with_a_trained_router_sft_computes_mixtrals_balancing_and_drops_the_models_own(tokenizer, data, tmp_path):
    own = {"router_scoring": "sigmoid", "router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.3}
    model = build("hf_moe", tokenizer, **own)
    trainer = trainer_for(SFTTrainer, model, tokenizer, data, tmp_path, router_aux_loss_coef=0.5)
    batch = batch_of(trainer)
    loss = trainer.compute_loss(model, copy.deepcopy(batch))
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    config = model.config
    mixtral = load_balancing_loss_func(
        outputs.router_logits, config.num_experts, config.num_experts_per_tok, batch["attention_mask"]
    )
    ours = model(**batch).loss
    torch.testing.assert_close(loss, cross_entropy(model, batch).float() + 0.5 * mixtral, rtol=1e-4, atol=1e-5)
    assert abs(float((ours - loss).detach())) > 0.05


@pytest.mark.parametrize("family", MODELS)
def test_moe_sft_trainer_takes_the_models_own_loss(family, tokenizer, data, tmp_path):
    model = build(family, tokenizer, router_aux_loss_coef=0.5)
    trainer = trainer_for(MoeSFTTrainer, model, tokenizer, data, tmp_path, router_aux_loss_coef=None)
    batch = batch_of(trainer)
    own = model(**copy.deepcopy(batch)).loss
    assert float(own.detach()) > float(cross_entropy(model, batch).detach()) + 0.1  # its balancing is on
    torch.testing.assert_close(trainer.compute_loss(model, copy.deepcopy(batch)), own, rtol=1e-6, atol=1e-6)


def test_moe_sft_trainer_trains_the_router_and_logs(tokenizer, data, tmp_path):
    model = build("hf_moe", tokenizer, router_aux_loss_coef=0.5, router_z_loss_coef=0.3)
    before = copy.deepcopy(model.model.layers[0].mlp.gate.state_dict())
    options = {"max_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no"}
    trainer = trainer_for(MoeSFTTrainer, model, tokenizer, data, tmp_path, router_aux_loss_coef=None, **options)
    trainer.train()
    assert [record["step"] for record in trainer.state.log_history if "loss" in record] == [1, 2]
    assert not torch.equal(model.model.layers[0].mlp.gate.state_dict()["weight"], before["weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dft", "router_aux_loss_coef": None}, "Use SFTTrainer"),
        ({"router_aux_loss_coef": 0.1}, "must be None, got 0.1"),
    ],
)
def test_moe_sft_trainer_refuses_what_the_model_does_not_compute(options, message, tokenizer, data, tmp_path):
    model = build("hf_moe", tokenizer)
    with pytest.raises(ValueError, match=message):
        trainer_for(MoeSFTTrainer, model, tokenizer, data, tmp_path, **options)


def test_trl_turns_the_auxiliary_loss_on_by_itself_and_our_arguments_do_not(tokenizer, data, tmp_path):
    model = build("hf_moe", tokenizer, router_aux_loss_coef=0.5)
    assert trainer_for(SFTTrainer, model, tokenizer, data, tmp_path, router_aux_loss_coef=None).aux_loss_enabled
    assert not trainer_for(SFTTrainer, model, tokenizer, data, tmp_path).aux_loss_enabled


@pytest.mark.parametrize("kind", [SftArguments, DpoArguments])
def test_bfloat16_is_left_off_where_no_gpu_has_it(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_moe.finetuning.trl.is_torch_bf16_gpu_available", lambda: False)
    assert kind(output_dir=str(tmp_path)).bf16 is False
    assert kind(output_dir=str(tmp_path), bf16=True, use_cpu=True).bf16 is True  # asked for


# ---- TRL's own balancing loss, in a script of its trainers


def plain_trainer(name, folder, model, tokenizer, mixin=None, callbacks=(), **options):
    """As a script builds it: with the config's own defaults."""
    kind, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    made = type(f"Mixed{name}", (mixin, kind), {}) if mixin else kind
    if name == "GRPO":
        options |= {"reward_funcs": lambda completions, **kwargs: [float(len(text)) for text in completions]}
    texts = [{"prompt": words(4, row), "chosen": words(5, row + 9), "rejected": words(5, row + 5)} for row in range(8)]
    if name == "KTO":
        texts = [
            {"prompt": text["prompt"], "completion": text["chosen"], "label": row % 2 == 0}
            for row, text in enumerate(texts)
        ]
    if name == "SFT":
        texts = [{"text": text["prompt"]} for text in texts]
    settings = {"GRPO": {"num_generations": 4, "max_completion_length": 4}}.get(name, {"max_length": 24})
    tokenizer.pad_token = tokenizer.eos_token
    arguments = config(
        str(folder), use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True, report_to="none",
        per_device_train_batch_size=4, max_steps=1, save_strategy="no", logging_steps=1, **settings,
    )  # fmt: skip
    return made(
        model, args=arguments, train_dataset=Dataset.from_list(texts), processing_class=tokenizer,
        callbacks=list(callbacks), **options,
    )  # fmt: skip


@pytest.fixture
def own_loss(tokenizer, tmp_path):
    """A model whose config has the coefficient while its forward adds nothing by default, as Qwen3-MoE's."""
    folder = tmp_path / "model"  # TRL loads the reference model from it
    build("qwen3_moe", tokenizer, router_aux_loss_coef=0.5, output_router_logits=False).save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


BALANCED = BalancingConfig(aux_loss_coef=0.01)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "SFT"])
def test_trls_own_balancing_loss_beside_ours_is_refused(name, own_loss, tokenizer, tmp_path):
    """DPO logged moe/aux_loss 1.489 and TRL's aux_loss 2.29: both were trained."""
    with pytest.raises(BalancingError, match=r"router_aux_loss_coef=?0\.0 in"):
        plain_trainer(name, tmp_path, own_loss, tokenizer, BalancingMixin, balancing=BALANCED)


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "SFT"])
def test_trls_own_loss_on_a_router_frozen_too_late_is_refused(name, own_loss, tokenizer, tmp_path):
    trainer = plain_trainer(name, tmp_path, own_loss, tokenizer, callbacks=[RouterFreezeCallback()])
    freeze_router(trainer.model)
    with pytest.raises(RouterNotFrozenError, match="call freeze_router before the trainer is built"):
        trainer.train()


@pytest.mark.parametrize("keep", [False, True])
def test_a_router_frozen_in_time_has_no_loss_from_trl_unless_kept(keep, own_loss, tokenizer, tmp_path, caplog):
    freeze_router(own_loss, keep_aux_loss=keep)
    trainer = plain_trainer("DPO", tmp_path, own_loss, tokenizer, callbacks=[RouterFreezeCallback()])
    trainer.train()
    assert ("aux_loss" in trainer.state.log_history[0]) == keep
    assert ("TRL's trainer adds the auxiliary loss of a frozen router" in caplog.text) == keep


def test_packed_examples_do_not_see_each_other(tokenizer, data, tmp_path):
    """The loss of a packed row is that of its examples, each alone."""
    short = Dataset.from_list([{"text": words(3, seed)} for seed in range(6)])
    model = build("hf_moe", tokenizer)
    packed = trainer_for(SFTTrainer, model, tokenizer, short, tmp_path, packing=True)
    alone = trainer_for(SFTTrainer, model, tokenizer, short, tmp_path, packing=False)
    assert len(packed.train_dataset) < len(alone.train_dataset)
    totals = []
    for trainer in (packed, alone):
        trainer.args.per_device_train_batch_size = 1
        trainer.model.eval()
        nats = tokens = 0
        for batch in trainer.get_train_dataloader():
            count = int((batch["labels"][:, 1:] != -100).sum())
            nats += float(trainer.compute_loss(trainer.model, batch).detach()) * count
            tokens += count
        totals.append(nats / tokens)
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


def test_the_card_of_a_push_is_ours(tokenizer, data, tmp_path):
    """`push_to_hub` saves the model into the output folder and calls for its card; before that there is nothing."""
    trainer = trainer_for(SafeSFTTrainer, build("hf_moe", tokenizer), tokenizer, data, tmp_path)
    trainer.create_model_card(model_name="x")
    assert not (tmp_path / "README.md").exists()
    trainer.save_model()
    trainer.create_model_card(model_name="x")
    card = (tmp_path / "README.md").read_text()
    assert "experts_implementation" in card
    assert "None" not in card
