"""The table that is printed before training: what is trained on what, how much memory that takes, and warnings."""

from collections.abc import Mapping

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_moe.finetuning.domains import Data
from hf_moe.finetuning.prepare import Job
from hf_moe.finetuning.run.checkpointing import (
    Choice,
    choose_checkpointing,
    device_memory,
    set_checkpointing,
    supports_checkpointing,
)
from hf_moe.finetuning.run.learning_rate import rate_warning, rounding_warning
from hf_moe.finetuning.surroundings import versions
from hf_moe.observability.explain import explain
from hf_moe.planner.step_memory import StepMemory, measured_step_memory, with_checkpointing


def rows_per_step(arguments: TrainingArguments) -> int:
    """Rows of one optimizer step, over all processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def trained_rows(arguments: TrainingArguments, data: Data) -> int:
    """Rows of the whole run, over all processes."""
    per_step = rows_per_step(arguments)
    if arguments.max_steps > 0:
        return arguments.max_steps * per_step
    return max(per_step, round(arguments.num_train_epochs * data.num_rows) // per_step * per_step)


def plan_run(job: Job[Data], model: nn.Module) -> None:
    """Decide on gradient checkpointing, in the job's arguments, and print the plan and what is to be warned of."""
    memory, choice = _memory_plan(job, model)
    set_checkpointing(job.training, choice.on)
    if job.training.process_index == 0:
        Console().print(_table(job, model, memory, choice))


def warn_of_rate(model: nn.Module, arguments: TrainingArguments) -> None:
    """Print what speaks against the learning rate, for what `model` trains."""
    rate, trained = arguments.learning_rate, "adapter" if isinstance(model, PeftModel) else "weights"
    found = [rate_warning(rate, explain(model).total_parameters, trained), rounding_warning(model, rate)]
    for warning in filter(None, found):
        if arguments.process_index == 0:
            Console().print(f"warning: {warning}", style="yellow", highlight=False, markup=False)


def _table(job: Job[Data], model: nn.Module, memory: StepMemory | None, choice: Choice) -> Table:
    data, arguments = job.data, job.training
    per_step, steps = rows_per_step(arguments), trained_rows(arguments, data) // rows_per_step(arguments)
    size = explain(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = Table(title=job.method, title_justify="left", show_header=False)
    table.add_row(
        "parameters", f"{size.total_parameters:,} total, {size.active_parameters:,} active, {count:,} trained"
    )
    table.add_row("trained tensors", _kinds(model))
    table.add_row("memory of a process", str(memory or "not known: the forward of one row does not fit the device"))
    table.add_row("gradient checkpointing", f"{'on' if choice.on else 'off'}: {choice.why}")
    table.add_row("learning rate", _rate(arguments, steps))
    table.add_row("steps", f"{steps:,} of {per_step} rows of {data.row_length} tokens")
    table.add_row("data", "\n".join(_domains(data)))
    table.add_row("experts", "\n".join(map(str, size.choices)) or "as transformers chooses")
    table.add_row("device, seed", f"{arguments.device}, {arguments.seed}")
    table.add_row("versions", ", ".join(f"{name} {value}" for name, value in versions().items()))
    return table


def _rate(arguments: TrainingArguments, steps: int) -> str:
    schedule = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
    warm_up = arguments.get_warmup_steps(steps)
    return f"{arguments.learning_rate:g}, {schedule}, {warm_up:,} step{'s' * (warm_up != 1)} of warm-up"


def _domains(data: Data) -> list[str]:
    return [
        f"{name} {domain.share:.0%}: {domain.train}; held out: {domain.held_out.size()}"
        for name, domain in data.domains.items()
    ]


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


def _memory_plan(job: Job[Data], model: nn.Module) -> tuple[StepMemory | None, Choice]:
    """The memory of a step as it will be trained, and whether with gradient checkpointing."""
    arguments = job.training
    row = next(iter(job.data.domains.values())).train_rows[0]
    without = _memory(model, row, arguments)
    tokens = arguments.train_batch_size * len(row["input_ids"])
    recomputed = None if without is None else with_checkpointing(without, model, tokens)
    available, supported = device_memory(arguments.device), supports_checkpointing(model)
    choice = choose_checkpointing(arguments.asked_checkpointing, without, recomputed, available, supported)
    return recomputed if choice.on else without, choice


def _memory(model: nn.Module, row: Mapping[str, Tensor], arguments: TrainingArguments) -> StepMemory | None:
    """Memory of a step without checkpointing, from one row's forward; None if that does not fit the device."""
    mixed = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    try:
        return measured_step_memory(
            model,
            row,
            batch_size=arguments.train_batch_size,
            accumulates=arguments.gradient_accumulation_steps > 1,
            autocast=mixed,
        )
    except torch.OutOfMemoryError:
        return None  # its layers may fit one by one: with checkpointing the run goes on
