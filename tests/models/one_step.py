"""One SGD step of a tiny model with the plain Trainer; the weights it leaves are the gradient. Also run by torchrun:

one_step.py FOLDER JSON     (JSON: the arguments of `one_step`)
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_hf_moe import SIZES, random_ids, tiny_config


def rows(kind: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Rows that are the same (a micro-batch is balanced as the whole batch is), different, or unevenly masked."""
    ids = random_ids(1, 16).repeat(count, 1) if kind == "same" else random_ids(count, 16)
    labels = ids.clone()
    if kind == "uneven":
        for row in range(count):
            labels[row, : 3 * row] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def one_step(output_dir: str, kind: str, batch_size: int, accumulation: int, **config) -> dict[str, torch.Tensor]:
    """The parameters after one step of learning rate 1 over 8 rows."""
    torch.manual_seed(0)
    native = config.pop("native", False)
    if native:
        model_config = Qwen3MoeConfig(**SIZES, head_dim=8, output_router_logits=True, router_aux_loss_coef=1.0)
    else:
        model_config = tiny_config(**config)
    model = AutoModelForCausalLM.from_config(model_config)
    arguments = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(model, arguments, train_dataset=rows(kind, 8))
    trainer.train()
    return {name: value.detach().clone() for name, value in model.named_parameters()}


if __name__ == "__main__":
    weights = one_step(sys.argv[1], **json.loads(sys.argv[2]))
    if torch.distributed.get_rank() == 0:
        torch.save(weights, Path(sys.argv[1]) / "weights.pt")
    # a process that ends while gloo's threads still run aborts now and then
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
