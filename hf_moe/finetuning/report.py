"""The report of a recipe, as JSON values and as a table: every domain's metrics and routing, before and after."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_moe.adapters.frozen_router import router_hash
from hf_moe.comparison.routing_agreement import routing_agreement
from hf_moe.finetuning.domains import Data, Measurable
from hf_moe.finetuning.measure import Measured
from hf_moe.finetuning.prepare import Job
from hf_moe.finetuning.run.plan import rows_per_step
from hf_moe.finetuning.surroundings import machine, versions
from hf_moe.finetuning.train import Trained
from hf_moe.observability.explain import explain

# of transformers' TrainingArguments, for the report
SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "seed",
    # of TRL's
    "max_length",
    "packing",
    "beta",
    "loss_type",
)


def report(job: Job[Data], before: Measured, trained: Trained, after: Measured, *, saved: str) -> dict[str, Any]:
    """The JSON values of `report.json`.

    Args:
        saved: The folder in the output folder that holds the result, for its size.
    """
    rows, data = rows_per_step(job.training), job.data
    tokens = trained.steps * rows * data.row_length if data.packed else None
    return run_report(job, trained, saved=saved) | measured_report(job, before, after) | {"tokens": tokens}


def measured_report(job: Job[Measurable], before: Measured, after: Measured) -> dict[str, Any]:
    """What was measured before and after training: by domain, the routing's health, samples."""
    return {
        "domains": domain_report(job.data, before, after),
        "health": {"before": str(before.health), "after": str(after.health)},
        "samples": [
            {"domain": one.domain, "prompt": one.prompt, "before": one.text, "after": two.text}
            for one, two in zip(before.samples, after.samples, strict=True)
        ],
        "sample_seconds": round(before.sample_seconds + after.sample_seconds, 1),
    }


def run_report(job: Job[Any], trained: Trained, *, saved: str, libraries: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the run was, and what became of it.

    Args:
        saved: The folder in the output folder that holds the result, for its size.
        libraries: Those to give the versions of, beside the usual ones.
    """
    size, options = explain(trained.model), job.training.to_dict()
    return {
        "recipe": job.method,
        "date": date.today().isoformat(),
        "command": job.command,
        "choices": job.choices,
        "training": {name: options[name] for name in SETTINGS if name in options}
        | {"rows_per_step": rows_per_step(job.training)},
        "versions": versions(*libraries),
        "machine": machine(job.training),
        "model_type": job.model.config.model_type,
        "parameters": {
            "total": size.total_parameters,
            "active": size.active_parameters,
            "trained": trained.num_trained,
        },
        "saved_bytes": folder_bytes(job.folder / saved),
        "router_sha256": {"before": job.router_sha256, "after": router_hash(trained.model)},
        "steps": trained.steps,
        "seconds_per_step": trained.seconds_per_step,
        "log": trained.log,
        "evaluations": trained.evaluations,
    }


def domain_report(data: Measurable, before: Measured, after: Measured) -> dict[str, Any]:
    """JSON values by domain: its share of the data, metrics before and after, routing agreement per layer."""
    return {
        name: {
            "share": domain.share,
            "examples": len(domain.train.examples),
            "tokens": domain.train.tokens,
            "loss_tokens": domain.train.loss_tokens,
            "truncated": domain.train.truncated,
            "before": before.metrics[name].to_dict(),
            "after": after.metrics[name].to_dict(),
            "routing_agreement": routing_agreement(before.choices[name], after.choices[name]),
        }
        for name, domain in data.domains.items()
    }


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def print_domains(domains: Mapping[str, Any], folder: Path) -> None:
    """A table of bits per byte before and after, how many tokens still go to the same experts, and the folder."""
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
