"""What the fine-tuning recipes share: loading, data, the banner, and the run with the ordinary Trainer."""

import json
import logging
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_moe.adapters.frozen_router import RouterNotFrozenError, save_router_hash, verify_adapter_without_router
from hf_moe.adapters.readable import UnreadableAdapterError
from hf_moe.data.chat_text import read_chat_template
from hf_moe.data.corpus import TextError
from hf_moe.data.encoding import Encoder, Encoding, Example, cut
from hf_moe.data.packing import draw
from hf_moe.data.rows import Mixture, Rows, pack_examples, pad_examples
from hf_moe.data.sources import DataError, Source, hold_out, read_source
from hf_moe.finetuning.arguments import DataArguments, ModelArguments, RecipeError, RecipeTrainingArguments
from hf_moe.finetuning.other_towers import copy_processor, freeze_what_text_does_not_reach, has_other_towers
from hf_moe.finetuning.surroundings import without_host_warnings
from hf_moe.io.run_lock import LOCK, RunRefusedError, hold_until_the_end
from hf_moe.io.whole_files import whole_folder
from hf_moe.loading import pretrained as loading
from hf_moe.loading.pretrained import ModelError, check_language_model, load_language_model
from hf_moe.observability.explain import explain
from hf_moe.training.memory import StepMemory, step_memory
from hf_moe.training.trainer import MoeTrainer

logger = logging.getLogger(__name__)

# what a recipe says in one line
_REFUSALS = (
    DataError,
    ImportError,
    ModelError,
    OSError,
    RecipeError,
    RouterNotFrozenError,
    RunRefusedError,
    TextError,
    UnreadableAdapterError,
)

DTYPES = ("auto", "float32", "bfloat16", "float16")
LIBRARIES = ("hf-moe", "torch", "transformers", "peft", "accelerate", "datasets")


def known_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The model's config, after everything that can be refused without its weights.

    Raises:
        RecipeError: If there is no such model, or it is none that a recipe trains.
    """
    try:
        return check_language_model(arguments.model)
    except ModelError as error:
        raise RecipeError(str(error)) from error


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        RecipeError: If it is damaged.
        DataError: If the chat template of the arguments cannot be read.
        OSError: If it cannot be found.
    """
    try:
        tokenizer = loading.load_tokenizer(arguments.model)
    except ValueError as error:
        raise RecipeError(f"the tokenizer of {arguments.model!r} cannot be loaded: {error}") from error
    if arguments.chat_template is not None:
        tokenizer.chat_template = read_chat_template(arguments.chat_template)
    return tokenizer


def load_model(arguments: ModelArguments, device: torch.device) -> PreTrainedModel:
    """The model with all its towers, where it is trained. What text does not reach of it is frozen.

    Raises:
        RecipeError: If it is none that a recipe trains, or a choice is unknown or cannot run it.
    """
    if arguments.dtype not in DTYPES:
        raise RecipeError(f"dtype must be one of {', '.join(DTYPES)}, got {arguments.dtype!r}.")
    try:
        model = load_language_model(
            arguments.model, dtype=arguments.dtype, experts_implementation=arguments.experts_implementation
        )
    except ModelError as error:
        raise RecipeError(str(error)) from error
    model.to(device)
    found = explain(model)
    if reason := found.refusals.get(arguments.experts_implementation):
        raise RecipeError(f"experts_implementation {arguments.experts_implementation!r} cannot run here: {reason}")
    frozen = freeze_what_text_does_not_reach(model) if has_other_towers(model) else []
    if frozen:
        logger.warning(
            "text does not reach %d tensors of %s, such as %s: they stay as they are.",
            len(frozen),
            found.model_class,
            frozen[0],
        )
    for warning in found.warnings:
        logger.warning(warning)
    model.config.use_cache = False
    return model


@dataclass
class Data:
    """What to learn from and what to measure on, by domain; shares sum to 1."""

    shares: dict[str, float]
    encodings: dict[str, Encoding]
    rows: dict[str, Rows]
    held_out_encodings: dict[str, Encoding]
    held_out: dict[str, Rows]

    def mixture(self, count: int, seed: int) -> Mixture:
        """`count` rows with each domain's share, spread evenly."""
        available = {name: len(rows) for name, rows in self.rows.items()}
        return Mixture(self.rows, draw(available, self.shares, count=count, seed=seed))

    def probe(self, domain: str, row_length: int, most: int = 8) -> torch.Tensor:
        """Up to `most` rows of held-out tokens without padding, int64 `[rows, row_length]`; if few, a shorter one."""
        ids = [token for example in self.held_out_encodings[domain].examples for token in example.input_ids]
        row_length = min(row_length, len(ids))
        count = min(most, len(ids) // row_length)
        return torch.tensor(ids[: count * row_length]).view(count, row_length)


def prepare_data(
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    context: int | None = None,
    chat_options: Mapping[str, Any] | None = None,
) -> Data:
    """Read, tokenise, split and pack every data set.

    Args:
        context: Tokens that the model can read at once; longer rows hold several examples, none of them longer.
        chat_options: Variables of the chat template.

    Raises:
        DataError, TextError: For a data set that cannot be used.
        RecipeError: If two data sets have one domain.
    """
    sources = [Source.parse(value) for value in arguments.datasets]
    names = [source.domain for source in sources]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise RecipeError(f"two data sets have the domain {repeated.pop()!r}. Give each a domain of its own.")
    longest = min(arguments.row_length, context or arguments.row_length)
    encoder = Encoder(tokenizer, max_length=longest, assistant_only=arguments.assistant_only, options=chat_options)
    total = sum(source.weight for source in sources)
    if not total:
        raise RecipeError("every data set has the weight 0: there is nothing to train on. Give one a weight.")
    data = Data({source.domain: source.weight / total for source in sources}, {}, {}, {}, {})
    for source in sources:
        name = source.domain
        data_set = read_source(source, on_bad_row=arguments.on_bad_row)
        encoded = list(data_set.apply(encoder.encode).values())
        train, held_out = hold_out(
            encoded, share=arguments.held_out, most=arguments.held_out_records, where=source.path
        )
        data.encodings[name] = cut(train, longest, source.path)
        data.encodings[name].remarks = data_set.remarks()
        data.rows[name] = _rows(data.encodings[name].examples, tokenizer, arguments)
        data.held_out_encodings[name] = cut(held_out, longest, source.path)
        data.held_out[name] = _rows(data.held_out_encodings[name].examples, tokenizer, arguments)
    return data


def _rows(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, arguments: DataArguments) -> Rows:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    make = pack_examples if arguments.packing else pad_examples
    return make(examples, row_length=arguments.row_length, padding=padding)


def rows_per_step(arguments: RecipeTrainingArguments) -> int:
    """Rows of one optimizer step, over all processes."""
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def trained_rows(arguments: RecipeTrainingArguments, data: Data) -> int:
    """Rows of the whole run, over all processes."""
    per_step = rows_per_step(arguments)
    if arguments.max_steps > 0:
        return arguments.max_steps * per_step
    epoch = sum(map(len, data.rows.values()))
    return max(per_step, round(arguments.num_train_epochs * epoch) // per_step * per_step)


def banner(model: nn.Module, data: Data, arguments: RecipeTrainingArguments, method: str) -> None:
    """Say what is about to happen, before it does."""
    rows = trained_rows(arguments, data)
    row_length = next(iter(data.rows.values())).columns["input_ids"].shape[1]
    per_step = rows_per_step(arguments)
    size = explain(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    table = Table(title=method, title_justify="left", show_header=False)
    table.add_row(
        "parameters", f"{size.total_parameters:,} total, {size.active_parameters:,} active, {count:,} trained"
    )
    table.add_row("trained tensors", _kinds(model))
    table.add_row("memory of a process", str(_memory(model, data, arguments)))
    table.add_row("steps", f"{rows // per_step:,} of {per_step} rows of {row_length} tokens")
    table.add_row("data", "\n".join(f"{name} {data.shares[name]:.0%}: {e}" for name, e in data.encodings.items()))
    table.add_row("experts", "\n".join(map(str, size.choices)) or "as transformers chooses")
    table.add_row("device, seed", f"{arguments.device}, {arguments.seed}")
    table.add_row("versions", ", ".join(f"{name} {value}" for name, value in versions().items()))
    if arguments.process_index == 0:
        Console().print(table)


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


def _memory(model: nn.Module, data: Data, arguments: RecipeTrainingArguments) -> StepMemory:
    """Of a training step of this process, from one row's forward."""
    mixed = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    return step_memory(
        model,
        next(iter(data.rows.values()))[0],
        batch_size=arguments.train_batch_size,
        accumulates=arguments.gradient_accumulation_steps > 1,
        checkpointing=arguments.gradient_checkpointing,  # the name that all supported versions know
        autocast=mixed,
    )


def versions(*more: str) -> dict[str, str]:
    """Of what a result depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in (*LIBRARIES, *more)}}


class MetricsFile(TrainerCallback):
    """Every log of the Trainer as a line of `metrics.jsonl` in the output folder."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with open(Path(args.output_dir, "metrics.jsonl"), "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")


def run(
    model: nn.Module,
    data: Data,
    arguments: RecipeTrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> MoeTrainer:
    """The ordinary Trainer over the mixture.

    `resume_from_checkpoint: auto` goes on from the newest checkpoint that is valid. SIGTERM saves one and ends the
    program with the exit code 75, and leaves the file `RESUMABLE` (`torchrun` itself ends with 1).
    """
    set_seed(arguments.seed)
    trainer = MoeTrainer(
        model=model,
        args=arguments,
        train_dataset=data.mixture(trained_rows(arguments, data), arguments.seed),
        callbacks=[MetricsFile(), *callbacks],
    )
    refuse_shards(trainer)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    return trainer


def refuse_shards(trainer: Trainer) -> None:
    """Raises RecipeError under FSDP: recipes save in one process what every process would have to gather."""
    if trainer.is_fsdp_enabled:
        raise RecipeError(
            "recipes train in one process or with DistributedDataParallel (torchrun), not with FSDP. Leave it out, or "
            "take MoeTrainer in a script of your own."
        )


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter and the routers' hash, whole or not at all.

    Raises:
        RouterNotFrozenError: If the adapter would hold a router's tensor.
    """
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary, save_embedding_layers=False)
        (temporary / "README.md").unlink()  # PEFT's empty card; ours is one level up
        verify_adapter_without_router(temporary, model)
        save_router_hash(temporary, model)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the model, its tokenizer, its processor and the routers' hash, whole or not at all."""
    with whole_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if has_other_towers(model) and not copy_processor(model.name_or_path, temporary):
            logger.warning("%s has no processor files to save beside the model.", model.name_or_path)
        save_router_hash(temporary, model)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def refuse_used_folder(arguments: RecipeTrainingArguments) -> None:
    """Hold the output folder until the recipe ends (`frees_folders`).

    Raises:
        RecipeError: If it holds an earlier run that is not to be resumed.
        RunRefusedError: If another run works in it.
    """
    folder = Path(str(arguments.output_dir))
    if arguments.process_index == 0:
        hold_until_the_end(folder)
    if arguments.resume_from_checkpoint is None and folder.exists() and set(os.listdir(folder)) - {LOCK}:
        raise RecipeError(
            f"the output folder {str(folder)!r} is not empty. Choose another, or go on with what is there: "
            "--resume_from_checkpoint auto."
        )


@contextmanager
def recipe_errors() -> Iterator[None]:
    """Say what cannot be used in one line, and exit with 2."""
    try:
        with without_host_warnings():
            yield
    except _REFUSALS as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        sys.exit(2)
