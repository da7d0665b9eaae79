"""One SGD step of a tiny float64 model that is balanced; what it changed is the gradient. Also run by torchrun:

balanced_step.py FOLDER JSON     (JSON: the arguments of `one_step`)
"""

import json
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent))
from hf_moe.training.balancing.mixin import BalancingConfig
from hf_moe.training.trainer import MoeTrainer
from tiny_models import build_tiny
from tiny_moe import hf_moe_model, qwen_model

ROWS, LENGTH = 8, 10


def model_of(family: str):
    if family in ("hf_moe", "hf_moe, one layer"):
        layers = 3 if family == "hf_moe" else 1
        model = hf_moe_model(
            router_aux_loss_coef=0.0, router_z_loss_coef=0.0, router_bias=True, num_hidden_layers=layers
        )
    else:
        model = qwen_model() if family == "qwen3_moe" else build_tiny(family)[0]
    model.set_experts_implementation("eager")  # the fused ones have no float64
    return model.double()


def rows(same: bool = False) -> list[dict[str, torch.Tensor]]:
    """Rows of random tokens; unless they are the same, with padding and masked labels of different lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 60, (1 if same else ROWS, LENGTH), generator=generator).expand(ROWS, LENGTH).clone()
    mask, labels = torch.ones_like(ids), ids.clone()
    if not same:
        for row in range(ROWS):
            end = LENGTH - 3 * row % 5
            ids[row, end:], mask[row, end:] = 0, 0
            labels[row, : 1 + row % 3], labels[row, end:] = -100, -100
    columns = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return [{name: column[row] for name, column in columns.items()} for row in range(ROWS)]


def arguments(folder, batch_size: int, accumulation: int, **overrides) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "train_sampling_strategy": "sequential",
        **overrides,
    }
    return TrainingArguments(str(folder), **settings)


def one_step(folder, family: str, batch_size: int, accumulation: int, balancing=None, same=False, **overrides):
    """The trainer after one step of learning rate 1 over 8 rows, and the gradient by parameter."""
    model = model_of(family)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = MoeTrainer(
        model,
        arguments(folder, batch_size, accumulation, **overrides),
        train_dataset=rows(same),
        balancing=None if balancing is None else BalancingConfig(**balancing),
    )
    trainer.train()
    gradient = {name: before[name] - value.detach() for name, value in model.named_parameters()}
    return trainer, gradient


if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    trainer, gradient = one_step(sys.argv[1], **options)
    if torch.distributed.get_rank() == 0:
        buffers = {name: value for name, value in trainer.model.named_buffers() if "correction" in name}
        (log,) = [log for log in trainer.state.log_history if "loss" in log]
        torch.save({"gradient": gradient, "buffers": buffers, "log": log}, Path(sys.argv[1]) / "step.pt")
    # a process that ends while gloo's threads still run aborts now and then
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
