"""The first step of a fine-tuning recipe: everything that cannot be used is refused, the rest is a `Job`."""

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from transformers import (
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from hf_moe.adapters.frozen_router import router_hash
from hf_moe.data.chat_text import read_chat_template
from hf_moe.data.encoding import context_of
from hf_moe.finetuning.arguments import DataArguments, ModelArguments, RecipeError, RecipeTrainingArguments
from hf_moe.finetuning.domains import Data, read_data
from hf_moe.finetuning.other_towers import freeze_what_text_does_not_reach, has_other_towers
from hf_moe.finetuning.packing_check import check_packing
from hf_moe.io.names import without_folders
from hf_moe.io.run_lock import LOCK, hold_until_the_end
from hf_moe.loading import pretrained
from hf_moe.loading.pretrained import DTYPES, ModelError, check_language_model, load_language_model
from hf_moe.observability.explain import explain
from hf_moe.observability.unquantised_experts import quantisation_method

logger = logging.getLogger(__name__)


AnyData = TypeVar("AnyData", covariant=True)
_DEQUANTISE = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}


@dataclass(frozen=True)
class Job(Generic[AnyData]):
    """A run of a recipe before it trains: model, tokenizer, data, arguments.

    Attributes:
        method: The method's name, as the report has it.
        command: How the recipe was called.
        choices: For the report: the recipe's own arguments, the model, how data are put into rows.
        training: The Trainer's arguments.
        tokenizer: Of the model, with the chat template that was chosen.
        data: What to learn from and what to measure on.
        model: As loaded, on its device; no adapter, nothing frozen but what text does not reach.
        router_sha256: `router_hash` of the model as loaded.
    """

    method: str
    command: str
    choices: dict[str, Any]
    training: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    data: AnyData
    model: PreTrainedModel
    router_sha256: str

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(str(self.training.output_dir))


def prepare(
    method: str,
    command: str,
    own: Any,
    base: ModelArguments,
    texts: DataArguments,
    training: RecipeTrainingArguments,
) -> Job[Data]:
    """Take the output folder, seed, read the data, load the model; whatever cannot be used is refused.

    Args:
        method: The method's name, as the report has it.
        command: How the recipe was called.
        own: The recipe's own arguments, a dataclass.

    Raises:
        RecipeError, DataError, OSError: Before any training.
    """
    refuse_used_folder(training)
    set_seed(training.seed)  # new adapter weights are drawn before the Trainer sets it
    config = known_config(base)
    tokenizer = load_tokenizer(base)
    data = read_data(tokenizer, texts, context_of(config), base.chat_options)
    model = load_model(base, training.device, config)
    if texts.packing:
        check_packing(model, texts.row_length)
    choices = {**asdict(own), **chosen_model(base, model), "row_length": texts.row_length}
    return Job(method, command, choices, training, tokenizer, data, model, router_hash(model))


def chosen_model(base: ModelArguments, model: PreTrainedModel) -> dict[str, Any]:
    """For the report: the model's name, what of it was chosen, and the commit that the Hub gave."""
    chosen = {
        "model": without_folders(base.model),
        "revision": base.revision,
        "commit": getattr(model.config, "_commit_hash", None),
        "dtype": None if base.dtype == "auto" else base.dtype,
        "attn_implementation": base.attn_implementation,
        "chat_template_kwargs": base.chat_options or None,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def refuse_used_folder(arguments: TrainingArguments) -> None:
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
            f"the output folder {str(folder)!r} is not empty. Choose another, or continue what is there: "
            "--resume_from_checkpoint auto."
        )


def known_config(arguments: ModelArguments) -> PreTrainedConfig:
    """The model's config, after everything that can be refused without its weights.

    Raises:
        RecipeError: If there is no such model, or it is none that a recipe trains.
    """
    try:
        return check_language_model(arguments.model, arguments.revision)
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
        tokenizer = pretrained.load_tokenizer(arguments.model, revision=arguments.revision)
    except ValueError as error:
        raise RecipeError(f"the tokenizer of {arguments.model!r} cannot be loaded: {error}") from error
    if arguments.chat_template is not None:
        tokenizer.chat_template = read_chat_template(arguments.chat_template)
    return tokenizer


def dequantised(config: PreTrainedConfig) -> dict[str, Any]:
    """Options of `from_pretrained` that read quantised weights as bfloat16, which can be trained.

    Raises:
        RecipeError: For a quantiser whose weights transformers cannot read so.
    """
    method = quantisation_method(config)
    if method is None:
        return {}
    if method not in _DEQUANTISE:
        raise RecipeError(
            f"the checkpoint is quantised ({method}), and recipes train weights of 16 or 32 bits. Name the checkpoint "
            "that it was made from."
        )
    logger.warning(
        "the checkpoint is quantised (%s): its weights are read as bfloat16, which takes more memory.", method
    )
    settings = getattr(config, "quantization_config", None)
    stored = settings if isinstance(settings, dict) else {}
    # transformers takes this list from what is passed here, and no longer from the checkpoint
    kept = stored.get("modules_to_not_convert")
    return {"quantization_config": _DEQUANTISE[method](dequantize=True, modules_to_not_convert=kept)}


def load_model(
    arguments: ModelArguments, device: torch.device, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """The model with all its towers, where it is trained. What text does not reach of it is frozen.

    Weights that are saved in MXFP4 or FP8 are read as bfloat16.

    Args:
        config: What `known_config` returned, where it has been called already.

    Raises:
        RecipeError: If it is none that a recipe trains, or a choice is unknown or cannot run it.
    """
    if arguments.dtype not in DTYPES:
        raise RecipeError(f"dtype must be one of {', '.join(DTYPES)}, got {arguments.dtype!r}.")
    backend = arguments.experts_implementation
    try:
        model = load_language_model(
            arguments.model,
            checked=config,
            dtype=arguments.dtype,
            experts_implementation=backend,
            attn_implementation=arguments.attn_implementation,
            revision=arguments.revision,
            **dequantised(config or known_config(arguments)),
        )
    except ModelError as error:
        raise RecipeError(str(error)) from error
    model.to(device)
    found = explain(model)
    if reason := found.refusals.get(backend):
        raise RecipeError(f"experts_implementation {backend!r} cannot run here: {reason}")
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
