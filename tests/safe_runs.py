"""A tiny run with what makes resuming hard: router noise, dropout, gradient accumulation, shuffled rows."""

import torch
from transformers import TrainingArguments

from hf_moe.data.packing import PackedRows
from hf_moe.training.trainer import MoeTrainer
from tiny_moe import hf_moe_model

ROWS = torch.randint(1, 64, (40, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
STEPS, SAVE_EVERY = 6, 2


class SafeTrainer(MoeTrainer):
    """Notes the step at which it began."""

    began: int

    def _run_epoch(self, **epoch):
        self.began = min(self.state.global_step, getattr(self, "began", STEPS))
        super()._run_epoch(**epoch)


def arguments(folder, **overrides):
    settings = {
        "max_steps": STEPS,
        "save_steps": SAVE_EVERY,
        "save_total_limit": 1,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "dataloader_pin_memory": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
    }
    return TrainingArguments(str(folder), **{**settings, **overrides})


def make_trainer(folder, model=None, callbacks=(), trainer_class=SafeTrainer, rows=ROWS, **overrides):
    if model is None:
        model = hf_moe_model(router_jitter_noise=0.1, attention_dropout=0.1, num_hidden_layers=2)
    data = PackedRows(rows)
    training = arguments(folder, **overrides)
    return trainer_class(model=model, args=training, train_dataset=data, eval_dataset=data, callbacks=list(callbacks))


def train(folder, resume=None, **settings):
    trainer = make_trainer(folder, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def state(trainer):
    """Every weight, and every tensor of the optimizer."""
    tensors = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    for index, values in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{index} {name}": torch.as_tensor(value).clone() for name, value in values.items()}
    return tensors


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
