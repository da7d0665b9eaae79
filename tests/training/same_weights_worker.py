"""Trainers whose processes must train one model, each after an evaluation; run by torchrun.

same_weights_worker.py FOLDER     (holds a saved model in `model`)
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from trl import DPOConfig, SFTConfig

from hf_moe.adapters.frozen_router import freeze_router
from hf_moe.data.packing import PackedRows
from hf_moe.finetuning.trl import SafeDPOTrainer, SafeSFTTrainer
from hf_moe.training.balancing.mixin import BalancingCallback, BalancingConfig, BalancingMixin
from hf_moe.training.callbacks import RouterFreezeCallback
from hf_moe.training.same_weights import SameWeightsCallback, SameWeightsError
from hf_moe.training.trainer import MoeTrainer
from tiny_moe import tiny_tokenizer, words

ROWS = torch.randint(1, 60, (8, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
SETTINGS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "warmup_steps": 1,  # the first step moves nothing
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}


class BalancedTrainer(BalancingMixin, Trainer):
    pass


class Weights(TrainerCallback):
    """The sum of all weights at the end, and the gradient norms."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
        self.sum = float(sum(p.detach().double().abs().sum() for p in whole))
        self.norms = [log["grad_norm"] for log in state.log_history if "grad_norm" in log]


def trainer_of(kind: str, folder: Path, seen: Weights, callbacks=()):
    base, _, option = kind.partition(" ")
    layout = {"distributed_config": DistributedConfig(fsdp_size=2)} if option == "native" else {}
    model = AutoModelForCausalLM.from_pretrained(folder / "model", **layout)
    settings = {**SETTINGS, "output_dir": str(folder / "out"), "bf16": option == "bf16"}
    if option == "frozen":
        freeze_router(model)
    callbacks = [seen, *callbacks]
    if base in ("sft", "dpo"):
        columns = ("text",) if base == "sft" else ("prompt", "chosen", "rejected")
        data = [{column: words(6, 3 * row + i) for i, column in enumerate(columns)} for row in range(8)]
        made, config = {"sft": (SafeSFTTrainer, SFTConfig), "dpo": (SafeDPOTrainer, DPOConfig)}[base]
        arguments = config(**settings, max_length=24, gradient_checkpointing=False, router_aux_loss_coef=0.0)
        data = Dataset.from_list(data)
        tokenizer = tiny_tokenizer()
        adapter = LoraConfig(target_modules=["q_proj"], init_lora_weights=False) if base == "dpo" else None
        return made(
            model, args=arguments, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
            peft_config=adapter, callbacks=callbacks,
        )  # fmt: skip
    made = {"moe": MoeTrainer, "balanced": BalancedTrainer, "stock": Trainer}[base]
    data = PackedRows(ROWS)
    return made(model, TrainingArguments(**settings), train_dataset=data, eval_dataset=data, callbacks=callbacks)


def outcome(kind: str, folder: Path, evaluated: bool, callbacks=()):
    seen = Weights()
    trainer = trainer_of(kind, folder, seen, callbacks)
    if evaluated:
        trainer.evaluate()
    try:
        trainer.train()
    except SameWeightsError as error:
        return str(error)
    return [seen.sum, *seen.norms]


class OwnSteps(SameWeightsCallback):
    """An optimizer that does not do the same in each process."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.lm_head.weight[0, 0] += dist.get_rank()
        super().on_optimizer_step(args, state, control, model=model, **kwargs)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    kinds = ["moe", "moe bf16", "balanced", "sft", "dpo"]
    has_engine = hasattr(Trainer, "_sync_replicated_trainable_parameters")  # not there in transformers 5.17
    kinds += ["moe native"] * has_engine
    outcomes = {kind: [outcome(kind, folder, evaluated) for evaluated in (False, True)] for kind in kinds}
    bias = BalancingCallback(BalancingConfig(bias_update_rate=0.001))
    stock = {"stock": SameWeightsCallback(), "stock frozen": RouterFreezeCallback(), "stock bias": bias}
    stock |= {"stock native": SameWeightsCallback()} if has_engine else {}
    outcomes |= {kind: outcome(kind, folder, True, [callback]) for kind, callback in stock.items()}
    outcomes["own steps"] = outcome("stock", folder, False, [OwnSteps()])
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()
