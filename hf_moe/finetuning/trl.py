"""TRL's trainers on a Mixture-of-Experts: what they need, and what they would drop. Needs the extra `trl`.

TRL 1.16 runs the backbone and multiplies by the language model's head itself (`fused_lm_head`), so that the loss of
the model's `forward` is never computed. With a frozen router nothing is lost: the auxiliary losses are off, and the
cross entropy is the same (held by `tests/finetuning/test_trl.py`). With a trained router TRL computes Mixtral's
balancing loss from the router's logits, over all layers at once: a router z-loss, balancing per layer or over the
global batch, sigmoid scores and selection biases are dropped without a word. `MoeSFTTrainer` takes the model's own
loss there; before `DPOTrainer`, with `router_aux_loss_coef=0.0` in its config, `BalancingMixin` adds losses instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainerCallback
from transformers.utils import is_torch_bf16_gpu_available

from hf_moe.adapters.expert_lora import expert_lora_config
from hf_moe.adapters.frozen_router import router_hash
from hf_moe.data.encoding import context_of
from hf_moe.finetuning.arguments import (
    PATIENCE_HELP,
    SAMPLES,
    SAMPLES_HELP,
    SMOKE_HELP,
    ExpertLoraArguments,
    ModelArguments,
    RecipeError,
    check_own,
)
from hf_moe.finetuning.card import write_results
from hf_moe.finetuning.measure import Measured, measure
from hf_moe.finetuning.prepare import Job, chosen_model, known_config, load_model, load_tokenizer, refuse_used_folder
from hf_moe.finetuning.report import measured_report, print_domains, run_report
from hf_moe.finetuning.save import OwnCardMixin, save_adapter
from hf_moe.finetuning.train import MetricsFile, Trained, refuse_shards
from hf_moe.finetuning.trl_data import TrlData, TrlDataArguments
from hf_moe.io.installation import install_command
from hf_moe.training.checkpointing.safe_checkpoint import SafeCheckpointMixin
from hf_moe.training.routing_metrics import RoutingMetricsCallback

try:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(f"TRL is not installed. Install it with: {install_command('trl')}") from error


class SafeSFTTrainer(OwnCardMixin, SafeCheckpointMixin, SFTTrainer):
    """SFTTrainer whose checkpoints a kill cannot damage, and which stops at a loss that is not finite."""


class SafeDPOTrainer(OwnCardMixin, SafeCheckpointMixin, DPOTrainer):
    """DPOTrainer whose checkpoints a kill cannot damage, and which stops at a loss that is not finite."""


class MoeSFTTrainer(SafeSFTTrainer):
    """SFTTrainer with the loss that the model computes, its balancing losses in it. For a router that is trained.

    Every step builds the logits `[batch, sequence, vocab]`, which SFTTrainer spares, and TRL's `entropy`,
    `mean_token_accuracy` and `num_tokens` are not logged. With a frozen router SFTTrainer computes the same loss.

    Raises:
        ValueError: For another `loss_type` than `nll`, or a `router_aux_loss_coef`: the model has its own.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.loss_type != "nll":
            raise ValueError(f"the model's own loss is 'nll', got loss_type {self.args.loss_type!r}. Use SFTTrainer.")
        if self.args.router_aux_loss_coef is not None:
            raise ValueError(
                f"router_aux_loss_coef must be None, got {self.args.router_aux_loss_coef}: the model weighs its "
                "balancing losses itself. Set it in the model's config before the model is built."
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


@dataclass
class _FrozenRouterArguments:
    """Settings of the recipes for every config of TRL: the auxiliary loss, which TRL turns on by itself, is off."""

    router_aux_loss_coef: float | None = field(default=0.0)
    report_to: None | str | list[str] = field(default="none")  # noqa: RUF036
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.03)
    early_stopping_patience: int | None = field(default=None, metadata={"help": PATIENCE_HELP})
    sample_prompts: int = field(default=SAMPLES, metadata={"help": SAMPLES_HELP})
    smoke: bool = field(default=False, metadata={"help": SMOKE_HELP})

    def __post_init__(self) -> None:
        _set_up(self)
        super().__post_init__()  # type: ignore[misc]


def _set_up(arguments: Any) -> None:
    """TRL's bfloat16, where nothing is asked for, only on a device that has it; and `check_own`."""
    if arguments.bf16 is None and (arguments.use_cpu or not is_torch_bf16_gpu_available()):
        arguments.bf16 = False
    check_own(arguments)


@dataclass
class SftArguments(_FrozenRouterArguments, SFTConfig):
    """TRL's SFTConfig for a frozen router."""

    output_dir: str | None = field(default="sft-output")
    learning_rate: float = field(default=1e-4)


@dataclass
class DpoArguments(_FrozenRouterArguments, DPOConfig):
    """TRL's DPOConfig for a frozen router."""

    output_dir: str | None = field(default="dpo-output")
    learning_rate: float = field(default=5e-6)  # of TRL's own DPO script with LoRA


def prepare_for_trl(
    method: str,
    command: str,
    adapter: ExpertLoraArguments,
    base: ModelArguments,
    texts: TrlDataArguments,
    training: Any,
    read: Callable[..., TrlData],
) -> Job[TrlData]:
    """Take the output folder, read the data, load the model; whatever cannot be used is refused.

    Args:
        method: The method's name, as the report has it.
        command: How the recipe was called.
        training: `SftArguments` or `DpoArguments`.
        read: `read_for_sft` or `read_for_dpo`.

    Raises:
        RecipeError, DataError, OSError: Before any training.
    """
    refuse_used_folder(training)
    config = known_config(base)
    tokenizer = load_tokenizer(base)
    data = read(texts, training, tokenizer, base.chat_options, context_of(config))
    # TRL cannot build a model type that another package registers
    model = load_model(base, training.device, config)
    choices = {**asdict(adapter), **chosen_model(base, model)}
    return Job(method, command, choices, training, tokenizer, data, model, router_hash(model))


def expert_lora_trainer(
    kind: type[Trainer], job: Job[TrlData], adapter: ExpertLoraArguments, callbacks: Sequence[TrainerCallback]
) -> Trainer:
    """TRL's trainer of this kind over the job's data and model, with LoRA on the experts.

    Raises:
        RecipeError: Under FSDP.
    """
    trainer = kind(
        job.model,
        args=job.training,
        train_dataset=job.data.train,
        eval_dataset=job.data.held_out,
        processing_class=job.tokenizer,
        # not a PeftModel: DPOTrainer would copy its adapter for the reference
        peft_config=expert_lora_config(job.model, **asdict(adapter)),
        callbacks=[MetricsFile(), *callbacks],
    )
    refuse_shards(trainer)
    # before the other callbacks, so that metrics.jsonl and trackers get its metrics
    RoutingMetricsCallback().attach(trainer)
    return trainer


class Evaluated(NamedTuple):
    """Held-out records, as TRL's trainer evaluates them, and as the other recipes do."""

    metrics: dict[str, float]
    measured: Measured


def evaluate(job: Job[TrlData], trainer: Trainer) -> Evaluated:
    """TRL's metrics of the held-out records, without its times, and what `measure` tells of them.

    Raises:
        RecipeError: If `metric_for_best_model` is none that TRL gives.
    """
    timing = ("runtime", "per_second", "_time", "num_tokens", "epoch")
    given = {key.removeprefix("eval_"): value for key, value in trainer.evaluate().items()}
    found = {key: value for key, value in given.items() if not f"eval_{key}".endswith(timing)}
    best = (job.training.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in given:
        raise RecipeError(f"metric_for_best_model must be one of {', '.join(found)}, got {best!r}.")
    return Evaluated(found, measure(job, trainer.model))


def save_and_report(job: Job[TrlData], before: Evaluated, trained: Trained, after: Evaluated) -> dict[str, Any]:
    """Save `adapter/`, write `report.json`, plots and the card, print the metrics; returns the report.

    Args:
        before, after: What `evaluate` returned.
    """
    if trained.is_main_process:
        save_adapter(trained.model, job.tokenizer, job.folder / "adapter")
    last = trained.log[-1] if trained.log else {}
    report = {
        **run_report(job, trained, saved="adapter", libraries=("trl",)),
        **measured_report(job, before.measured, after.measured),
        "held_out": {"before": before.metrics, "after": after.metrics},
        # TRL counts them, and logs the sum
        "tokens": round(last["num_tokens"]) if last.get("step") == trained.steps and "num_tokens" in last else None,
    }
    if trained.is_main_process:
        write_results(job.folder, report, saved="adapter")
        _print_metrics(report["held_out"])
        print_domains(report["domains"], job.folder)
    return report


def _print_metrics(held_out: Mapping[str, Mapping[str, float]]) -> None:
    table = Table(title="Held-out records, by TRL", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in held_out["before"].items():
        table.add_row(name, f"{value:.4g}", f"{held_out['after'][name]:.4g}")
    Console().print(table)
