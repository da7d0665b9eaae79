"""The plain Trainer resumes: its checkpoints hold each expert by itself, the model in memory holds them fused."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_moe  # noqa: F401
from tiny_hf_moe import random_ids, tiny_config


def train(output_dir: str, resume: bool, **options) -> dict[str, torch.Tensor]:
    torch.manual_seed(1 if resume else 0)  # a resumed model starts from other weights, as a new process does
    model = AutoModelForCausalLM.from_config(tiny_config(router_jitter_noise=0.1))
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        max_steps=4,
        learning_rate=1e-2,
        save_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 12)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=f"{output_dir}/checkpoint-2" if resume else None)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def test_resume_is_bitwise_the_uninterrupted_run(tmp_path):
    expected = train(str(tmp_path), resume=False)
    actual = train(str(tmp_path), resume=True)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def test_load_state_dict_takes_both_layouts(tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config(num_null_experts=2))
    model.save_pretrained(tmp_path)
    per_expert = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in per_expert
    for state_dict in (per_expert, model.state_dict()):
        torch.manual_seed(1)
        other = AutoModelForCausalLM.from_config(tiny_config(num_null_experts=2))
        other.load_state_dict(state_dict)  # strict: nothing missing, nothing left over
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize(
    "name", ["experts.3.up_proj.weight", "experts.7.down_proj.weight", "experts.0.gate_proj.weight"]
)
def test_a_state_dict_without_one_expert_is_refused(name, tmp_path):
    model = AutoModelForCausalLM.from_config(tiny_config())
    model.save_pretrained(tmp_path)
    per_expert = load_file(tmp_path / "model.safetensors")
    del per_expert[f"model.layers.1.mlp.{name}"]
    with pytest.raises(ValueError, match=f"model.layers.1.mlp.{name} is missing"):
        model.load_state_dict(per_expert, strict=False)
