"""Train with the ordinary Trainer: the plan printed before, the run, and a record of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed

from hf_moe.finetuning.arguments import RecipeError
from hf_moe.finetuning.domains import Data
from hf_moe.finetuning.prepare import Job
from hf_moe.finetuning.run.evaluation import RecipeTrainer, check_best_metric, early_stopping
from hf_moe.finetuning.run.plan import plan_run, trained_rows, warn_of_rate
from hf_moe.finetuning.run.screen import ScreenLog


@dataclass(frozen=True)
class Trained:
    """A finished training.

    Attributes:
        model: The trained model.
        num_trained: Parameters that required a gradient.
        steps: Optimizer steps, those of an interrupted run before included.
        seconds_per_step: On average.
        log: The Trainer's records that have a loss.
        evaluations: Its records of evaluations while it trained, each with its step.
        is_main_process: Whether this process writes the results.
    """

    model: nn.Module
    num_trained: int
    steps: int
    seconds_per_step: float
    log: list[dict[str, float]]
    evaluations: list[dict[str, float]]
    is_main_process: bool


def train(job: Job[Data], model: nn.Module, callbacks: Sequence[TrainerCallback] = ()) -> Trained:
    """Print what will be trained, and train it over the mixture.

    `eval_strategy` evaluates the held-out rows of every domain meanwhile (`RecipeTrainer`).
    `resume_from_checkpoint: auto` continues from the newest checkpoint that is valid. SIGTERM saves one and ends the
    program with the exit code 75, and leaves the file `RESUMABLE` (`torchrun` itself ends with 1).
    """
    check_best_metric(job.training, job.data.domains)
    plan_run(job, model)
    set_seed(job.training.seed)
    trainer = RecipeTrainer(
        job=job,
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
    warn_of_rate(trainer.model, trainer.args)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    for callback in (ScreenLog(), *early_stopping(trainer.args)):
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    log, steps = trainer.state.log_history, trainer.state.global_step
    return Trained(
        model=trainer.model,
        num_trained=num_trained,
        steps=steps,
        seconds_per_step=log[-1]["train_runtime"] / steps,
        log=[record for record in log if "loss" in record],
        evaluations=[record for record in log if "eval_loss" in record],
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
