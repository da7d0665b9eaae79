"""Dataclasses of a recipe: each field is a key of the YAML config and an option of the command line."""

import json
import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_moe.data.formats import check_options
from hf_moe.finetuning.run.checkpointing import asked_for, set_checkpointing
from hf_moe.training.checkpointing.checkpoints import TOKEN_IS_PICKLED

_NO_4_BIT = (
    "is not supported yet: bitsandbytes quantises linear layers and leaves fused experts, most of a "
    "Mixture-of-Experts, in 16 bits, so that little memory would be spared. Use a smaller r, shorter rows or adapter "
    "experts; `hf-moe info MODEL` says what fits."
)
REFUSED = {
    "load_in_4bit": _NO_4_BIT,
    "load_in_8bit": _NO_4_BIT,
    "trust_remote_code": "is not taken: recipes run no code of a checkpoint. Use a model type that transformers has.",
}
"""Options that other trainers have, each with why the recipes have it not."""
PATIENCE_HELP = "End after so many evaluations without a better metric_for_best_model."
SMOKE_HELP = "Four short steps, to see that everything works."
SAMPLES = 3
SAMPLES_HELP = "Held-out prompts that are continued before and after; the card quotes them. 0: none."


class RecipeError(ValueError):
    """A choice that cannot be used: names it, the rule, and the way out. Nothing has been done yet."""


@dataclass
class ModelArguments:
    """The model that is fine-tuned."""

    model: str = field(metadata={"help": "A model folder, or a name on the Hub."})
    experts_implementation: str = field(default="hf_moe", metadata={"help": "How experts run; see `hf-moe info`."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto (as saved), float32, bfloat16."})
    revision: str | None = field(
        default=None, metadata={"help": "Of model and tokenizer on the Hub: a commit, tag or branch."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2 or another that transformers has."}
    )
    chat_template: str | None = field(
        default=None, metadata={"help": "A Jinja file for conversations, if the tokenizer's will not do."}
    )
    # in the order of transformers, whose parser reads unions by position
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Variables of the chat template, as JSON: '{\"enable_thinking\": false}'."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except ValueError as error:
                raise RecipeError(f"chat_template_kwargs is not valid JSON ({error}).") from error
        check_options(self.chat_options)
        if self.revision is not None and os.path.isdir(self.model):
            raise RecipeError(f"revision is for models on the Hub, and {self.model!r} is a folder. Leave it out.")

    @property
    def chat_options(self) -> dict[str, Any]:
        """`chat_template_kwargs`, read."""
        return self.chat_template_kwargs or {}  # type: ignore[return-value]


@dataclass
class SourceArguments:
    """The data sets that it learns from. In YAML each may also be a mapping: path, domain, weight, config, split."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Files (.jsonl .json .csv, also .gz; .parquet .txt .md), folders, or Hub names."},
    )
    held_out: float = field(default=0.05, metadata={"help": "Share of each data set kept for evaluation."})
    held_out_records: int = field(default=64, metadata={"help": "At most this many records of each."})
    on_bad_row: str = field(
        default="error", metadata={"help": "Of rows that cannot be used: error, or skip to leave them out."}
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise RecipeError("no data: give at least one data set (data, --data).")
        if not 0 < self.held_out < 1:
            raise RecipeError(f"held_out must be a share between 0 and 1, got {self.held_out}.")
        if self.held_out_records < 1:
            raise RecipeError(f"held_out_records must be at least 1, got {self.held_out_records}.")


@dataclass
class DataArguments(SourceArguments):
    """The data sets that it learns from, and how they are put into rows."""

    row_length: int = field(default=1024, metadata={"help": "Tokens of a training row."})
    packing: bool = field(default=True, metadata={"help": "Several examples a row, kept apart by position ids."})
    assistant_only: bool = field(default=True, metadata={"help": "Learn only the assistant's turns of conversations."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_length < 8:
            raise RecipeError(f"row_length must be at least 8 tokens, got {self.row_length}.")


@dataclass
class ExpertLoraArguments:
    """The adapter."""

    r: int = field(default=16, metadata={"help": "Rank for each expert."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Twice the rank if not given."})
    attention: bool = field(default=False, metadata={"help": "Adapt the attention projections as well."})
    shared_experts: bool = field(default=False, metadata={"help": "Adapt the shared experts as well."})

    def __post_init__(self) -> None:
        if self.r < 1:
            raise RecipeError(f"r, the rank, must be at least 1, got {self.r}.")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise RecipeError(f"lora_alpha must be at least 1, got {self.lora_alpha}: the adapter is scaled by it.")


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """TrainingArguments of transformers with defaults for adapters on real models, early stopping, and `smoke`."""

    output_dir: str | None = field(default="finetune-output")
    learning_rate: float = field(default=1e-4)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.03, metadata={"help": "Steps of warm-up; below 1, their share of all."})
    logging_steps: float = field(default=10)
    logging_nan_inf_filter: bool = field(default=False)  # a NaN loss must not be logged as 0
    save_steps: float = field(default=100)
    save_total_limit: int | None = field(default=2)
    # in the order of transformers, whose parser reads unions by position
    report_to: None | str | list[str] = field(default="none")  # noqa: RUF036
    remove_unused_columns: bool | None = field(default=False)
    train_sampling_strategy: str = field(default="sequential")  # the mixture has put the rows in order
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Compute layers again in backward; by itself where memory is short."}
    )
    early_stopping_patience: int | None = field(default=None, metadata={"help": PATIENCE_HELP})
    sample_prompts: int = field(default=SAMPLES, metadata={"help": SAMPLES_HELP})
    smoke: bool = field(default=False, metadata={"help": SMOKE_HELP})

    def __post_init__(self) -> None:
        if self.hub_token is not None:
            raise RecipeError(TOKEN_IS_PICKLED)
        self.asked_checkpointing = asked_for(self)
        set_checkpointing(self, bool(self.asked_checkpointing))
        check_own(self)
        super().__post_init__()


@dataclass
class WeightTrainingArguments(RecipeTrainingArguments):
    """The same for recipes that train weights of the model itself."""

    learning_rate: float = field(default=1e-5)


def check_early_stopping(arguments: Any) -> None:
    """Raises RecipeError for a patience that nothing is evaluated for; sets what the Trainer would guess wrong."""
    patience = arguments.early_stopping_patience
    if patience is not None and patience < 1:
        raise RecipeError(f"early_stopping_patience must be at least 1 evaluation, got {patience}.")
    if patience is not None and str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) == "no":
        raise RecipeError("early_stopping_patience needs evaluations: set eval_strategy to steps or epoch.")
    if patience is not None and arguments.metric_for_best_model is None:
        arguments.metric_for_best_model = "loss"
    if arguments.greater_is_better is None and str(arguments.metric_for_best_model).endswith("bits_per_byte"):
        arguments.greater_is_better = False


def check_own(arguments: Any) -> None:
    """Check the numbers of a Trainer's arguments and early stopping, and set four short steps if `smoke` is set.

    Raises:
        RecipeError: If one is out of its range, or nothing is evaluated for early stopping.
    """
    if arguments.sample_prompts < 0:
        raise RecipeError(f"sample_prompts must be 0 or more, got {arguments.sample_prompts}.")
    check_early_stopping(arguments)
    _check_ranges(arguments)
    if not arguments.smoke:
        return
    arguments.max_steps, arguments.logging_steps, arguments.save_steps, arguments.eval_steps = 4, 1, 2, 2
    arguments.per_device_train_batch_size = min(arguments.per_device_train_batch_size, 2)


def _check_ranges(arguments: Any) -> None:
    """Raises RecipeError for numbers that transformers, torch or TRL would fall over in the middle, or turn round."""
    least = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "learning_rate": 0,
        "weight_decay": 0,
        # of TRL's
        "max_length": 2,
        "beta": 0,
    }
    for name, bound in least.items():
        value = getattr(arguments, name, None)
        if value is not None and value < bound:
            raise RecipeError(f"{name} must be at least {bound}, got {value:g}.")
    if arguments.max_steps <= 0 and arguments.num_train_epochs <= 0:
        raise RecipeError(f"num_train_epochs must be above 0, got {arguments.num_train_epochs:g}.")


RECIPE = (ModelArguments, DataArguments, RecipeTrainingArguments)
WEIGHT_RECIPE = (ModelArguments, DataArguments, WeightTrainingArguments)
