"""TRL's trainers on a Mixture-of-Experts: what they need, and what they would drop. Needs the extra `trl`.

TRL 1.16 runs the backbone and multiplies by the language model's head itself (`fused_lm_head`), so that the loss of
the model's `forward` is never computed. With a frozen router nothing is lost: the auxiliary losses are off, and the
cross entropy is the same (held by `tests/finetuning/test_trl.py`). With a trained router TRL computes Mixtral's
balancing loss from the router's logits, over all layers at once: a router z-loss, balancing per layer or over the
global batch, sigmoid scores and selection biases are dropped without a word. `MoeSFTTrainer` takes the model's own
loss there; before `DPOTrainer`, with `router_aux_loss_coef=0.0` in its config, `BalancingMixin` adds losses instead.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import Trainer
from transformers.utils import is_torch_bf16_gpu_available

from hf_moe.adapters.frozen_router import router_hash
from hf_moe.finetuning.arguments import ExpertLoraArguments, ModelArguments, RecipeError
from hf_moe.finetuning.prepare import folder_bytes, refuse_shards, save_adapter, versions
from hf_moe.io.names import without_folders
from hf_moe.io.whole_files import write_json
from hf_moe.observability.explain import explain
from hf_moe.training.checkpointing.safe_checkpoint import SafeCheckpointMixin

try:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.trainer.utils import get_trackio_space_url
except ImportError as error:
    raise ImportError('TRL is not installed. Install it with: pip install "hf-moe[trl]"') from error


class SafeSFTTrainer(SafeCheckpointMixin, SFTTrainer):
    """SFTTrainer whose checkpoints a kill cannot damage, and which stops at a loss that is not finite."""


class SafeDPOTrainer(SafeCheckpointMixin, DPOTrainer):
    """The same for DPOTrainer."""


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


def _set_up(arguments: Any) -> None:
    """Four short steps if `smoke` is set; TRL's bfloat16, where nothing is said of it, on a device that has it."""
    if arguments.bf16 is None and (arguments.use_cpu or not is_torch_bf16_gpu_available()):
        arguments.bf16 = False
    if arguments.smoke:
        arguments.max_steps, arguments.logging_steps, arguments.save_steps = 4, 1, 2
        arguments.per_device_train_batch_size = min(arguments.per_device_train_batch_size, 2)


@dataclass
class SftArguments(SFTConfig):
    """TRL's SFTConfig for a frozen router: its auxiliary loss, which TRL turns on by itself, is off."""

    output_dir: str | None = field(default="sft-trl-output")
    router_aux_loss_coef: float | None = field(default=0.0)
    report_to: None | str | list[str] = field(default="none")  # noqa: RUF036
    smoke: bool = field(default=False, metadata={"help": "Four short steps, to see that everything works."})

    def __post_init__(self) -> None:
        _set_up(self)
        super().__post_init__()


@dataclass
class DpoArguments(DPOConfig):
    """TRL's DPOConfig for a frozen router: its auxiliary loss, which TRL turns on by itself, is off."""

    output_dir: str | None = field(default="dpo-trl-output")
    router_aux_loss_coef: float | None = field(default=0.0)
    report_to: None | str | list[str] = field(default="none")  # noqa: RUF036
    smoke: bool = field(default=False, metadata={"help": "Four short steps, to see that everything works."})

    def __post_init__(self) -> None:
        _set_up(self)
        super().__post_init__()


def refuse_broken_trackio() -> None:
    """TRL asks trackio, where it is installed, for the card of every checkpoint: fail now and not at the first.

    Raises:
        RecipeError: If trackio is there and cannot be imported.
    """
    try:
        get_trackio_space_url()
    except ImportError as error:
        raise RecipeError(
            f"trackio is installed but cannot be imported ({error}), and TRL imports it for every checkpoint's card. "
            'Mend it (pip install "trackio>=0.43" "pillow<13"), or uninstall it.'
        ) from error


def train_and_save(
    trainer: Trainer, recipe: str, command: str, base: ModelArguments, adapter: ExpertLoraArguments
) -> dict[str, Any]:
    """Measure, train, measure again, save `adapter/` and `report.json`; returns the report."""
    refuse_shards(trainer)
    folder = Path(str(trainer.args.output_dir))
    hash_before, before = router_hash(trainer.model), trainer.evaluate()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    after = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_adapter(trainer.model, folder / "adapter")
    size = explain(trainer.model)
    log = [record for record in trainer.state.log_history if "loss" in record]
    report = {
        "recipe": recipe,
        "date": date.today().isoformat(),
        "command": command,
        "choices": {**asdict(adapter), "model": without_folders(base.model)},
        "versions": versions("trl"),
        "parameters": {
            "total": size.total_parameters,
            "active": size.active_parameters,
            "trained": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        },
        "router_sha256": {"before": hash_before, "after": router_hash(trainer.model)},
        "held_out": {"before": _measures(before), "after": _measures(after)},
        "steps": trainer.state.global_step,
        "log": log,
    }
    if trainer.is_world_process_zero():
        report["saved_bytes"] = folder_bytes(folder / "adapter")
        write_json(folder / "report.json", report)
        print_measures(report["held_out"])
        Console(soft_wrap=True).print(f"results: {folder}", markup=False, highlight=False)
    return report


def _measures(metrics: Mapping[str, float]) -> dict[str, float]:
    """What the Trainer's evaluation measured, without how long it took."""
    timing = ("runtime", "per_second", "_time", "num_tokens", "epoch")
    return {key.removeprefix("eval_"): value for key, value in metrics.items() if not key.endswith(timing)}


def print_measures(held_out: Mapping[str, Mapping[str, float]]) -> None:
    table = Table(title="Held-out records", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in held_out["before"].items():
        table.add_row(name, f"{value:.4g}", f"{held_out['after'][name]:.4g}")
    Console().print(table)
