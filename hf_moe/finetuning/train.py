"""Train with the ordinary Trainer: the plan printed before, the run, and a record of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_moe.finetuning.arguments import RecipeError
from hf_moe.finetuning.domains import Data
from hf_moe.finetuning.prepare import Job
from hf_moe.finetuning.save import OwnCardMixin
from hf_moe.finetuning.surroundings import versions
from hf_moe.observability.explain import explain
from hf_moe.planner.step_memory import StepMemory, measured_step_memory
from hf_moe.training.trainer import MoeTrainer


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        model: The trained model.
        num_trained: Parameters that required a gradient.
        steps: Optimizer steps, those of an interrupted run before included.
        seconds_per_step: On average.
        log: The Trainer's records that have a loss.
        is_main_process: Whether this process writes the results.
    """

    model: nn.Module
    num_trained: int
    steps: int
    seconds_per_step: float
    log: list[dict[str, float]]
    is_main_process: bool


class RecipeTrainer(OwnCardMixin, MoeTrainer):
    """The Trainer of the recipes."""


def train(job: Job[Data], model: nn.Module, callbacks: Sequence[TrainerCallback] = ()) -> Trained:
    """Print what will be trained, and train it over the mixture.

    `resume_from_checkpoint: auto` continues from the newest checkpoint that is valid. SIGTERM saves one and ends the
    program with the exit code 75, and leaves the file `RESUMABLE` (`torchrun` itself ends with 1).
    """
    _print_plan(job, model)
    set_seed(job.training.seed)
    trainer = RecipeTrainer(
        model=model,
        args=job.training,
        train_dataset=job.data.mixture(trained_rows(job.training, job.data), job.training.seed),
        callbacks=[MetricsFile(), *callbacks],
    )
    refuse_shards(trainer)
    return run_trainer(trainer)


def run_trainer(trainer: Trainer) -> Trained:
    """Train, or continue as `resume_from_checkpoint` of the Trainer's arguments says."""
    num_trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    log, steps = trainer.state.log_history, trainer.state.global_step
    return Trained(
        model=trainer.model,
        num_trained=num_trained,
        steps=steps,
        seconds_per_step=log[-1]["train_runtime"] / steps,
        log=[record for record in log if "loss" in record],
        is_main_process=trainer.is_world_process_zero(),
    )


def refuse_shards(trainer: Trainer) -> None:
    """Raises RecipeError under FSDP: recipes save in one process what every process would have to gather."""
    if trainer.is_fsdp_enabled:
        raise RecipeError(
            "recipes train in one process or with DistributedDataParallel (torchrun), not with FSDP. Leave it out, or "
            "take MoeTrainer in a script of your own."
        )


class MetricsFile(TrainerCallback):
    """Every log of the Trainer as a line of `metrics.jsonl` in the output folder."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with open(Path(args.output_dir, "metrics.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def rows_per_step(arguments: TrainingArguments) -> int:
    """Rows of one optimizer step, over all processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def trained_rows(arguments: TrainingArguments, data: Data) -> int:
    """Rows of the whole run, over all processes."""
    per_step = rows_per_step(arguments)
    if arguments.max_steps > 0:
        return arguments.max_steps * per_step
    return max(per_step, round(arguments.num_train_epochs * data.num_rows) // per_step * per_step)


def _print_plan(job: Job[Data], model: nn.Module) -> None:
    data, arguments = job.data, job.training
    per_step, steps = rows_per_step(arguments), trained_rows(arguments, data) // rows_per_step(arguments)
    size = explain(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    domains = [f"{name} {domain.share:.0%}: {domain.train}" for name, domain in data.domains.items()]
    table = Table(title=job.method, title_justify="left", show_header=False)
    table.add_row(
        "parameters", f"{size.total_parameters:,} total, {size.active_parameters:,} active, {count:,} trained"
    )
    table.add_row("trained tensors", _kinds(model))
    table.add_row("memory of a process", str(_memory(model, data, arguments)))
    table.add_row("steps", f"{steps:,} of {per_step} rows of {data.row_length} tokens")
    table.add_row("data", "\n".join(domains))
    table.add_row("experts", "\n".join(map(str, size.choices)) or "as transformers chooses")
    table.add_row("device, seed", f"{arguments.device}, {arguments.seed}")
    table.add_row("versions", ", ".join(f"{name} {value}" for name, value in versions().items()))
    if arguments.process_index == 0:
        Console().print(table)


def _kinds(model: nn.Module) -> str:
    """The last two parts of the names of trained tensors, PEFT's own left out, each with how many there are."""
    kinds: dict[str, int] = {}
    inner = ("default", "weight", "base_layer")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = [part for part in name.split(".") if not part.isdigit() and part not in inner]
            kind = ".".join(parts[-2:])
            kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _memory(model: nn.Module, data: Data, arguments: TrainingArguments) -> StepMemory:
    """Memory of a training step of this process, from one row's forward."""
    mixed = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return measured_step_memory(
        model,
        next(iter(data.domains.values())).train_rows[0],
        batch_size=arguments.train_batch_size,
        accumulates=arguments.gradient_accumulation_steps > 1,
        checkpointing=arguments.gradient_checkpointing,  # the name that all supported versions know
        autocast=mixed,
    )
