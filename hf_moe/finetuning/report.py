"""What fine-tuning did: every domain's held-out figures and routing, before and after."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, set_seed

from hf_moe.adapters.frozen_router import router_hash
from hf_moe.comparison.routing_agreement import RoutingChoices, record_choices, routing_agreement
from hf_moe.data.encoding import context_of
from hf_moe.finetuning.arguments import DataArguments, ModelArguments, RecipeTrainingArguments
from hf_moe.finetuning.held_out import HeldOut, evaluate_rows
from hf_moe.finetuning.packing_check import check_packing
from hf_moe.finetuning.prepare import (
    Data,
    banner,
    folder_bytes,
    known_config,
    load_model,
    load_tokenizer,
    prepare_data,
    refuse_used_folder,
    rows_per_step,
    run,
    versions,
)
from hf_moe.io.names import without_folders
from hf_moe.observability.explain import explain
from hf_moe.observability.health import Health
from hf_moe.observability.recording import record_routing

# of the host's TrainingArguments, for the report
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "seed",
)


@dataclass(frozen=True)
class Measurement:
    """By domain; `health` is the verdict on the routing of all."""

    figures: dict[str, HeldOut]
    choices: dict[str, RoutingChoices]
    health: Health


def measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Data, *, row_length: int, batch_size: int
) -> Measurement:
    """Held-out loss, and the experts chosen for held-out tokens, with the routing's health."""
    figures = {
        name: evaluate_rows(model, tokenizer, rows, batch_size=batch_size) for name, rows in data.held_out.items()
    }
    with record_routing(model) as trace:
        choices = {
            name: record_choices(model, data.probe(name, row_length), batch_size=batch_size) for name in data.held_out
        }
    return Measurement(figures, choices, trace.health())


def domain_report(data: Data, before: Measurement, after: Measurement) -> dict[str, Any]:
    """JSON values by domain: its share of the data, figures before and after, routing agreement per layer."""
    return {
        name: {
            "share": data.shares[name],
            "examples": len(data.encodings[name].examples),
            "tokens": data.encodings[name].tokens,
            "loss_tokens": data.encodings[name].loss_tokens,
            "truncated": data.encodings[name].truncated,
            "before": before.figures[name].to_dict(),
            "after": after.figures[name].to_dict(),
            "routing_agreement": routing_agreement(before.choices[name], after.choices[name]),
        }
        for name in data.held_out
    }


def print_domains(domains: Mapping[str, Any], folder: Path) -> None:
    """A table of bits per byte before and after, and how many tokens still go to the same experts; where all lies."""
    table = Table(title="Bits per byte of held-out text (lower is better)", title_justify="left")
    for column in ("domain", "share", "before", "after", "change", "same experts chosen"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, domain in domains.items():
        before, after = (domain[key]["bits_per_byte"] for key in ("before", "after"))
        same = domain["routing_agreement"]
        table.add_row(
            name,
            f"{domain['share']:.0%}",
            f"{before:.3f}",
            f"{after:.3f}",
            f"{after - before:+.3f}",
            f"{min(same):.0%} to {max(same):.0%}",
        )
    Console().print(table)
    Console(soft_wrap=True).print(f"results: {folder} (README.md is the model card)", markup=False, highlight=False)


def machine(arguments: RecipeTrainingArguments) -> dict[str, Any]:
    """What it ran on, as JSON values; `torch_threads` of one process."""
    device = arguments.device
    return {
        "architecture": platform.machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": arguments.world_size,
        "torch_threads": torch.get_num_threads(),
    }


class FineTuning:
    """What every fine-tuning recipe does around its method: load, measure, train, measure again, report.

    On entry everything that cannot be used is refused, and the held-out figures before training are taken.

    Args:
        method: The method's name, for people.
        command: How the recipe was called.
        own: The recipe's own arguments, a dataclass.

    Raises:
        RecipeError, DataError, TextError, OSError: Before any training.
    """

    def __init__(
        self,
        method: str,
        command: str,
        own: Any,
        base: ModelArguments,
        texts: DataArguments,
        training: RecipeTrainingArguments,
    ):
        refuse_used_folder(training)
        set_seed(training.seed)  # new adapter weights are drawn before the Trainer sets it
        self.method, self.command, self.training, self.texts = method, command, training, texts
        self.choices = {**asdict(own), "model": without_folders(base.model), "row_length": texts.row_length}
        if base.chat_options:
            self.choices["chat_template_kwargs"] = base.chat_options
        self.folder = Path(str(training.output_dir))
        self.context = context_of(known_config(base))
        self.tokenizer = load_tokenizer(base)
        self.data = prepare_data(self.tokenizer, texts, self.context, base.chat_options)
        self.model = load_model(base, training.device)
        if texts.packing:
            check_packing(self.model, texts.row_length)
        self.router_hash = router_hash(self.model)
        self.before = self._measure(self.model)

    def train(self, model: nn.Module, callbacks: Sequence[TrainerCallback] = ()) -> None:
        """Say what will be trained, train it, and measure again."""
        banner(model, self.data, self.training, self.method)
        self.num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.trainer = run(model, self.data, self.training, callbacks)
        self.after = self._measure(model)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes the results."""
        return self.trainer.is_world_process_zero()

    def report(self, saved: str) -> dict[str, Any]:
        """What was done, as JSON values.

        Args:
            saved: The folder in the output folder that holds the result, for its size.
        """
        model, log = self.trainer.model, self.trainer.state.log_history
        options = self.training.to_dict()
        size, steps, rows = explain(model), self.trainer.state.global_step, rows_per_step(self.training)
        return {
            "recipe": self.method,
            "date": date.today().isoformat(),
            "command": self.command,
            "model_type": self.model.config.model_type,
            "choices": self.choices,
            "versions": versions(),
            "machine": machine(self.training),
            "parameters": {
                "total": size.total_parameters,
                "active": size.active_parameters,
                "trained": self.num_trained,
            },
            "saved_bytes": folder_bytes(self.folder / saved),
            "router_sha256": {"before": self.router_hash, "after": router_hash(model)},
            "domains": domain_report(self.data, self.before, self.after),
            "health": {"before": str(self.before.health), "after": str(self.after.health)},
            "training": {**{name: options[name] for name in SETTINGS}, "rows_per_step": rows},
            "steps": steps,
            "tokens": steps * rows * self.texts.row_length if self.texts.packing else None,
            "seconds_per_step": log[-1]["train_runtime"] / steps,
            "log": [record for record in log if "loss" in record],
        }

    def _measure(self, model: nn.Module) -> Measurement:
        batch_size = self.training.per_device_eval_batch_size
        longest = min(self.texts.row_length, self.context or self.texts.row_length)
        return measure(model, self.tokenizer, self.data, row_length=longest, batch_size=batch_size)
