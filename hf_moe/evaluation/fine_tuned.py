"""What fine-tuning did: every domain's held-out figures and routing, before and after."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer

from hf_moe.evaluation.held_out import HeldOut, evaluate_rows
from hf_moe.observability.explain import explain
from hf_moe.observability.routing_agreement import RoutingChoices, record_choices, routing_agreement
from hf_moe.training.finetuning import Data, versions


@dataclass(frozen=True)
class Measurement:
    """By domain."""

    figures: dict[str, HeldOut]
    choices: dict[str, RoutingChoices]


def measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, data: Data, *, row_length: int, batch_size: int
) -> Measurement:
    """Held-out loss, and the experts chosen for held-out tokens."""
    figures = {
        name: evaluate_rows(model, tokenizer, rows, batch_size=batch_size) for name, rows in data.held_out.items()
    }
    choices = {
        name: record_choices(model, data.probe(name, row_length), batch_size=batch_size) for name in data.held_out
    }
    return Measurement(figures, choices)


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


def print_domains(domains: Mapping[str, Any]) -> None:
    """A table of bits per byte before and after, and how many tokens still go to the same experts."""
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


def fine_tuning_report(
    method: str,
    command: str,
    data: Data,
    before: Measurement,
    after: Measurement,
    router_hashes: tuple[str, str],
    trainer: Trainer,
    choices: Mapping[str, Any],
) -> dict[str, Any]:
    """What a recipe did, as JSON values.

    Args:
        router_hashes: `router_hash` before and after.
        choices: The recipe's arguments that matter.
    """
    log = trainer.state.log_history
    size = explain(trainer.model)
    return {
        "recipe": method,
        "date": date.today().isoformat(),
        "command": command,
        "choices": dict(choices),
        "versions": versions(),
        "machine": {"architecture": platform.machine(), "device": trainer.args.device.type},
        "parameters": {
            "total": size.total_parameters,
            "active": size.active_parameters,
            "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        },
        "router_sha256": dict(zip(("before", "after"), router_hashes, strict=True)),
        "domains": domain_report(data, before, after),
        "steps": trainer.state.global_step,
        "seconds_per_step": log[-1]["train_runtime"] / trainer.state.global_step,
        "log": [record for record in log if "loss" in record],
    }
