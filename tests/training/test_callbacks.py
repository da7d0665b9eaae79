"""Runs that went wrong are stopped before anything is saved."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ProgressCallback, TrainingArguments

from hf_moe.adapters.frozen_router import HASH_FILE, RouterNotFrozenError, freeze_router, verify_adapter_base
from hf_moe.data.packing import PackedRows
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.training.callbacks import BalanceProgress, RouterFreezeCallback
from hf_moe.training.trainer import MoeTrainer
from tiny_models import build_tiny
from tiny_moe import hf_moe_model, with_expert_lora

ROWS = torch.randint(0, 64, (16, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32)


def train(folder, model, callback, resume=None, **overrides):
    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, **overrides}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        logging_nan_inf_filter=False,
        **settings,
    )
    MoeTrainer(model=model, args=arguments, train_dataset=PackedRows(ROWS), callbacks=[callback]).train(
        resume_from_checkpoint=resume
    )


def test_a_frozen_router_passes(tmp_path):
    model = with_expert_lora(hf_moe_model())
    expected = freeze_router(model)
    callback = RouterFreezeCallback()
    train(tmp_path, model, callback)
    assert callback.router_hash == expected


def test_the_hash_lies_beside_every_saved_adapter(tmp_path):
    model = with_expert_lora(hf_moe_model())
    expected = freeze_router(model)
    train(tmp_path, model, RouterFreezeCallback())
    folders = [tmp_path, tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"]
    assert [json.loads((folder / HASH_FILE).read_text())["router_sha256"] for folder in folders] == [expected] * 3
    adapter = tmp_path / "checkpoint-4"
    assert (adapter / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(hf_moe_model(), adapter)
    assert verify_adapter_base(adapter, loaded, strict=True)
    with pytest.raises(RouterNotFrozenError, match="the routers differ"):
        verify_adapter_base(adapter, hf_moe_model(seed=1), strict=True)


def test_a_full_checkpoint_holds_the_hash(tmp_path):
    model = hf_moe_model()
    freeze_router(model)
    train(tmp_path, model, RouterFreezeCallback())
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-4")
    assert verify_adapter_base(tmp_path / "checkpoint-4", loaded, strict=True)


def test_a_run_resumes_on_the_routers_of_its_checkpoint_only(tmp_path):
    model = with_expert_lora(hf_moe_model())
    freeze_router(model)
    train(tmp_path, model, RouterFreezeCallback())
    train(tmp_path, model, RouterFreezeCallback(), resume=str(tmp_path / "checkpoint-2"))
    other = with_expert_lora(hf_moe_model(seed=1))
    freeze_router(other)
    with pytest.raises(RouterNotFrozenError, match="checkpoint-2' was trained with"):
        train(tmp_path, other, RouterFreezeCallback(), resume=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "olmoe"])
def test_all_linear_is_refused_at_the_start(tmp_path, family):
    model = get_peft_model(build_tiny(family)[0], LoraConfig(target_modules="all-linear", r=2))
    with pytest.raises(RouterNotFrozenError, match="all-linear"):
        train(tmp_path, model, RouterFreezeCallback())
    assert not list(tmp_path.glob("checkpoint-*"))


def test_an_auxiliary_loss_that_is_on_is_logged(tmp_path, caplog):
    model = hf_moe_model(router_aux_loss_coef=0.25)
    freeze_router(model, keep_aux_loss=True)
    caplog.clear()
    train(tmp_path, model, RouterFreezeCallback(), max_steps=1)
    assert "router_aux_loss_coef=0.25" in caplog.text


def test_a_trainable_router_is_refused_at_the_start(tmp_path):
    with pytest.raises(RouterNotFrozenError, match="requires a gradient"):
        train(tmp_path, hf_moe_model(), RouterFreezeCallback())
    assert not list(tmp_path.glob("checkpoint-*"))


class NudgeRouter(RouterFreezeCallback):
    """Something that changes a frozen router behind the optimizer's back."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            moe_layers(model)[1].router.weight[0, 0] += 1e-3


def test_a_changed_router_is_found_out(tmp_path):
    model = with_expert_lora(hf_moe_model())
    freeze_router(model)
    with pytest.raises(RouterNotFrozenError, match="the routers have changed"):
        train(tmp_path, model, NudgeRouter())
    assert not list(tmp_path.glob(f"checkpoint-*/{HASH_FILE}"))


def test_progress_shows_loss_and_balance_on_a_line(tmp_path, capsys):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, logging_steps=1, use_cpu=True, report_to="none", per_device_train_batch_size=4
    )
    trainer = MoeTrainer(model=hf_moe_model(), args=arguments, train_dataset=PackedRows(ROWS))
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(BalanceProgress)
    trainer.train()
    captured = capsys.readouterr()
    lines = [line for line in (captured.out + captured.err).replace("\r", "\n").split("\n") if "loss" in line]
    assert len(lines) == 2
    assert all("load entropy 0." in line and "x mean" in line for line in lines)
