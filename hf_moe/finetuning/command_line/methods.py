"""The methods of `hf-moe finetune`: which recipe each runs, and which options its help shows."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_moe.finetuning.command_line.source import REQUIRED, Option, options_of

_HERE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Method:
    """A method of fine-tuning.

    Attributes:
        recipe: Its module in `hf_moe.recipes`.
        summary: What is trained, in one line.
        groups: Titles of the help's groups, each with the dataclass of its options.
        base: The dataclass of transformers or TRL that the training options extend.
    """

    recipe: str
    summary: str
    groups: dict[str, str]
    base: str = "TrainingArguments"

    @property
    def needs(self) -> tuple[str, ...]:
        """Packages beyond those that hf_moe needs itself."""
        return ("accelerate", "peft", "datasets", *(["trl"] if self.base != "TrainingArguments" else []))


_LORA = {"LoRA": "ExpertLoraArguments"}
_PLAIN = {"Model": "ModelArguments", "Data": "DataArguments"}
_TRL = {"Model": "ModelArguments", "Data": "TrlDataArguments"}

METHODS = {
    "expert-lora": Method(
        "finetune_expert_lora",
        "LoRA on every expert, the routers frozen. The adapter loads in PEFT without hf_moe.",
        {**_PLAIN, **_LORA, "Training": "RecipeTrainingArguments"},
    ),
    "adapter-experts": Method(
        "finetune_adapter_experts",
        "A few small new experts beside the frozen base; several adapters share one base.",
        {**_PLAIN, "New experts": "AdapterExpertsArguments", "Training": "RecipeTrainingArguments"},
    ),
    "esft": Method(
        "finetune_esft",
        "Only the experts that the first data set uses, at full rank (ESFT, arXiv:2407.01906).",
        {**_PLAIN, "Choice of experts": "EsftArguments", "Training": "WeightTrainingArguments"},
    ),
    "full": Method(
        "finetune_full",
        "Every weight except the routers; these too with --train_router.",
        {**_PLAIN, "What is trained": "FullArguments", "Training": "WeightTrainingArguments"},
    ),
    "sft": Method(
        "sft_trl",
        "Expert LoRA with TRL's SFTTrainer, if you use TRL already.",
        {**_TRL, **_LORA, "Training": "SftArguments"},
        "SFTConfig",
    ),
    "dpo": Method(
        "dpo_trl",
        "Learn from preferences with TRL's DPOTrainer: expert LoRA on chosen and rejected answers.",
        {**_TRL, **_LORA, "Training": "DpoArguments"},
        "DPOConfig",
    ),
}


def method_of(recipe: str | None) -> str | None:
    """The method that a recipe's file runs, or None for a recipe of somebody's own."""
    names = {method.recipe: name for name, method in METHODS.items()}
    return names.get(Path(recipe).stem) if recipe is not None else None


# options of transformers and TRL that people set: what they mean, and their defaults there
_EVERYWHERE: dict[str, tuple[str, Any, str]] = {
    "output_dir": ("str", None, "Folder for adapter or model, report and checkpoints; a new or empty one."),
    "learning_rate": ("float", 5e-5, "Peak learning rate."),
    "lr_scheduler_type": ("str", "linear", "linear, cosine, constant_with_warmup or another of transformers."),
    "warmup_steps": ("float", 0, "Steps of warm-up; below 1, their share of all steps."),
    "num_train_epochs": ("float", 3.0, "Passes over the data."),
    "max_steps": ("int", None, "Optimizer steps in place of num_train_epochs, if above 0."),
    "per_device_train_batch_size": ("int", 8, "Rows at a time on each device."),
    "gradient_accumulation_steps": ("int", 1, "Batches of one optimizer step."),
    "gradient_checkpointing": ("bool", None, "Compute layers again in the backward pass, to save memory."),
    "bf16": ("bool", False, "Compute in bfloat16 where weights are float32."),
    "eval_strategy": ("str", "no", "When to evaluate in training: no, steps or epoch."),
    "eval_steps": ("float", None, "Steps from one evaluation to the next; logging_steps if not given."),
    "early_stopping_patience": ("int", None, ""),
    "logging_steps": ("float", 500, "Steps from one log line to the next."),
    "save_steps": ("float", 500, "Steps from one checkpoint to the next."),
    "resume_from_checkpoint": ("str", None, "auto continues from the newest valid checkpoint in output_dir."),
    "report_to": ("str", "none", "Trackers such as tensorboard, wandb, trackio; none."),
    "seed": ("int", 42, "Of the order of the data and of new weights."),
    "sample_prompts": ("int", None, ""),
    "smoke": ("bool", False, ""),
}
_OF_TRL: dict[str, tuple[str, Any, str]] = {
    "learning_rate": ("float", 2e-5, "Peak learning rate."),
    "gradient_checkpointing": ("bool", True, "Compute layers again in the backward pass, to save memory."),
    "bf16": ("bool", None, "Compute in bfloat16 where weights are float32; where a GPU has it if not given."),
    "logging_steps": ("float", 10, "Steps from one log line to the next."),
}
_SFT: dict[str, tuple[str, Any, str]] = {
    "max_length": ("int", 1024, "Tokens of a training row."),
    "packing": ("bool", False, "Several examples in a row."),
    "assistant_only_loss": ("bool", False, "Learn only the assistant's turns of conversations."),
}
_DPO: dict[str, tuple[str, Any, str]] = {
    "beta": ("float", 0.1, "How strongly the reference holds the policy back."),
    "loss_type": ("list[str]", ["sigmoid"], "sigmoid (DPO), ipo, hinge or another of TRL."),
    "max_length": ("int", 1024, "Tokens of prompt and answer together."),
}
_OF_BASE = {
    "TrainingArguments": _EVERYWHERE,
    "SFTConfig": _SFT | _EVERYWHERE | _OF_TRL,
    "DPOConfig": _DPO | _EVERYWHERE | _OF_TRL | {"learning_rate": ("float", 1e-6, "Peak learning rate.")},
}


def groups_of(method: Method, recipe: Path) -> dict[str, list[Option]]:
    """The options that the short help shows, by the titles of the groups.

    Args:
        recipe: The recipe's file.
    """
    files = [_HERE / "arguments.py", _HERE / "trl.py", _HERE / "trl_data.py", recipe]
    groups = {title: options_of(name, files) for title, name in method.groups.items()}
    groups["Data"]["data"] = replace(groups["Data"]["data"], default=REQUIRED)
    groups["Training"] = _most_used(groups["Training"], method.base)
    return {title: list(options.values()) for title, options in groups.items() if options}


def _most_used(own: dict[str, Option], base: str) -> dict[str, Option]:
    """Of the training options those that people set: ours with our defaults, the rest with those of `base`."""
    shown = {}
    for name, (kind, default, text) in _OF_BASE[base].items():
        if name in own:
            shown[name] = Option(name, own[name].kind, own[name].default, own[name].help or text)
        elif text:
            shown[name] = Option(name, kind, default, text)
    return shown
