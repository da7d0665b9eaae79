"""The Trainer's log gets the balance that really was, and resuming gives the run that was not interrupted."""

import copy

import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed

from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.comparison.routing_agreement import record_choices
from hf_moe.data.packing import PackedRows
from hf_moe.finetuning.arguments import RecipeError
from hf_moe.finetuning.train import refuse_shards
from hf_moe.observability.layer_statistics import load_entropy, max_violation
from hf_moe.training.checkpointing.checkpoints import CheckpointError
from hf_moe.training.checkpointing.safe_checkpoint import SafeCheckpointMixin
from hf_moe.training.trainer import MoeTrainer
from tiny_moe import MODELS, hf_moe_model, qwen_model, with_expert_lora

ROWS = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def arguments(folder, **overrides):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "save_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        **overrides,
    }
    return TrainingArguments(str(folder), **settings)


def train(folder, model, trainer_class=MoeTrainer, resume=None, **overrides):
    trainer = trainer_class(model=model, args=arguments(folder, **overrides), train_dataset=PackedRows(ROWS))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("family", MODELS)
def test_resumed_training_equals_uninterrupted_training(family, tmp_path):
    whole = train(tmp_path, MODELS[family]())
    resumed = train(tmp_path, MODELS[family](), resume=str(tmp_path / "checkpoint-4"))
    for (name, expected), actual in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(actual, expected), name
    assert [log for log in resumed.state.log_history if "loss" in log] == [
        log for log in whole.state.log_history if "loss" in log
    ]


def test_the_host_trainer_loses_the_experts_on_resume(tmp_path):
    """Why the safe Trainers load checkpoints themselves. If this fails, transformers is repaired: simplify."""
    whole = train(tmp_path, qwen_model(), Trainer)
    resumed = train(tmp_path, qwen_model(), Trainer, resume=str(tmp_path / "checkpoint-4"))
    experts = [trainer.model.model.layers[0].mlp.experts.down_proj for trainer in (whole, resumed)]
    assert not torch.equal(*experts)


def test_any_safe_trainer_loads_experts_and_types_as_they_were(tmp_path):
    """A router in float32 between weights in bfloat16 is not rounded."""

    class Plain(SafeCheckpointMixin, Trainer):
        pass

    saved = qwen_model().bfloat16()
    saved.model.layers[0].mlp.gate.float().weight.data.mul_(1 / 3)
    saved.save_pretrained(tmp_path)
    model = copy.deepcopy(saved)
    for parameter in model.parameters():
        parameter.data.zero_()
    Plain(model=model, args=arguments(tmp_path))._load_from_checkpoint(str(tmp_path))
    for (name, expected), actual in zip(saved.named_parameters(), model.parameters(), strict=True):
        assert actual.dtype == expected.dtype, name
        assert torch.equal(actual, expected), name


def test_resumed_adapter_equals_uninterrupted_adapter(tmp_path):
    def tuned():
        model = hf_moe_model()
        set_seed(0)
        model = with_expert_lora(model)
        freeze_router(model)
        return model

    whole = train(tmp_path, tuned())
    resumed = train(tmp_path, tuned(), resume=str(tmp_path / "checkpoint-4"))
    for (name, expected), actual in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(actual, expected), name


def test_the_best_model_is_loaded_with_its_experts(tmp_path):
    trainer = MoeTrainer(
        model=hf_moe_model(),
        args=arguments(
            tmp_path,
            eval_strategy="steps",
            eval_steps=4,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # the earlier checkpoint, so that loading shows
            learning_rate=5e-2,
        ),
        train_dataset=PackedRows(ROWS),
        eval_dataset=PackedRows(ROWS),
    )
    trainer.train()
    best = type(trainer.model).from_pretrained(trainer.state.best_model_checkpoint)
    for expected, actual in zip(best.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(actual, expected)


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    train(tmp_path, hf_moe_model())
    (tmp_path / "checkpoint-4" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-4': config.json is missing"):
        train(tmp_path, hf_moe_model(), resume=str(tmp_path / "checkpoint-4"))


def test_the_log_has_the_balance_of_the_steps_since_the_last_log(tmp_path):
    """One step over all rows with learning rate 0: the balance must be that of the untouched model on these rows."""
    model = hf_moe_model()
    choices = record_choices(model, ROWS)
    trainer = train(tmp_path, model, max_steps=1, per_device_train_batch_size=32, learning_rate=0.0)
    counts = [torch.bincount(experts.flatten(), minlength=8) for experts in choices.experts]
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    entropies = [load_entropy(layer) for layer in counts]
    assert log["moe/load_entropy"] == sum(entropies) / len(entropies)
    assert log["moe/load_entropy_min"] == min(entropies)
    assert log["moe/max_violation"] == max(max_violation(layer) for layer in counts)


def test_no_hook_stays_behind(tmp_path):
    model = hf_moe_model()
    train(tmp_path, model, max_steps=1)
    # the first forward installed transformers' own recorders, which stay
    before = [len(module._forward_hooks) for module in model.modules()]
    train(tmp_path, model, max_steps=1)
    assert [len(module._forward_hooks) for module in model.modules()] == before


def test_recipes_refuse_fsdp_before_they_train(tmp_path):
    """One process would save its part of the weights, or wait for the others for ever."""
    trainer = MoeTrainer(model=hf_moe_model(), args=arguments(tmp_path))
    refuse_shards(trainer)
    trainer.is_fsdp_enabled = True
    with pytest.raises(RecipeError, match="not with FSDP"):
        refuse_shards(trainer)


def test_evaluation_does_not_count(tmp_path):
    model = hf_moe_model()
    trainer = MoeTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1, logging_steps=2),
        train_dataset=PackedRows(ROWS),
        eval_dataset=PackedRows(ROWS[:4]),
    )
    seen = []
    take = trainer.routing_metrics.take

    def spy():
        seen.append(take())
        return seen[-1]

    trainer.routing_metrics.take = spy
    trainer.train()
    # one log of training: 2 steps x 4 rows x 16 tokens
    assert [{layer.tokens for layer in layers} for layers in seen] == [{2 * 4 * 16}]
