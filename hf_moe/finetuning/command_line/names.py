"""Names of options: what was meant by one that does not exist."""

from collections.abc import Collection
from difflib import get_close_matches

from hf_moe.finetuning.arguments import REFUSED

RENAMED = {"datasets": "data", "domains": "data"}
"""Old names, and what they are called now."""

ALIASES = {
    "alpha": ("lora_alpha",),
    "attn": ("attn_implementation",),
    "base_model": ("model",),
    "batch_size": ("per_device_train_batch_size",),
    "dataset": ("data",),
    "dataset_name": ("data",),
    "epochs": ("num_train_epochs",),
    "flash_attention": ("attn_implementation",),
    "grad_accum": ("gradient_accumulation_steps",),
    "lora_r": ("r",),
    "lora_rank": ("r",),
    "lr": ("learning_rate",),
    "max_length": ("row_length",),
    "max_seq_length": ("row_length", "max_length"),
    "model_name": ("model",),
    "model_name_or_path": ("model",),
    "output": ("output_dir",),
    "rank": ("r",),
    "resume": ("resume_from_checkpoint",),
    "row_length": ("max_length",),
    "sequence_len": ("row_length", "max_length"),
    "steps": ("max_steps",),
    "train_file": ("data",),
    "warmup_ratio": ("warmup_steps",),
}
"""Names in other trainers, and ours: the first that the recipe has."""


def with_underscores(name: str) -> str:
    """`--row-length` and `row_length` are one option."""
    return name.lstrip("-").replace("-", "_")


def refusal(name: str) -> str | None:
    """Why an option is not taken that had another name once, or that other trainers have."""
    plain = with_underscores(name)
    if plain in RENAMED:
        return f"{plain} is called {RENAMED[plain]} now."
    return f"{plain} {REFUSED[plain]}" if plain in REFUSED else None


def meant(name: str, known: Collection[str]) -> str | None:
    """The option of `known` that somebody who wrote `name` was after."""
    plain = with_underscores(name)
    candidates = [*(each for each in ALIASES.get(plain, ()) if each in known), *get_close_matches(plain, known, n=1)]
    return plain if plain in known else next(iter(candidates), None)
