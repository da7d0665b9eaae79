"""Load a Mixture-of-Experts language model whole: the one way that recipes, trace, compare and evaluate share.

Everything that would refuse it is checked before its weights are read: that it exists, its class, and that its experts
go through the interface of transformers.
"""

import copy
import os
from contextlib import suppress
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_moe.io.error_text import one_line
from hf_moe.layers.unseen_experts import required_layers
from hf_moe.loading.auto_classes import is_language_model, whole_auto_class
from hf_moe.loading.config_files import ConfigError, ModelError, check_config, config_errors, load_config
from hf_moe.loading.errors import HUB_ERRORS, hub_sentence

# that a model may be loaded in; "auto": as it is saved
DTYPES = ("auto", "float32", "bfloat16", "float16")
_SECONDS = 10.0


class ModelNotFoundError(ModelError, OSError):
    """There is no such model, or its config cannot be had."""


def find_model(name: str, *, file: str = "config.json", revision: str | None = None) -> None:
    """Check with one request that the Hub has `name`: transformers tries for half a minute before it gives up.

    Args:
        name: A folder, or a name on the Hub. Of a folder, or of what is in the Hub's cache, nothing is asked.
        file: What the cache holds of a model (or an adapter) that is there.
        revision: Commit, tag or branch that the cache must hold; default: that of the main branch.

    Raises:
        ModelNotFoundError: If there is no such folder, and the Hub has no such repository or cannot be reached.
    """
    if os.path.exists(name):
        return
    try:
        if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return
        HfApi().model_info(name, timeout=_SECONDS)
    except HUB_ERRORS as error:
        if isinstance(error, HfHubHTTPError) and not isinstance(error, RepositoryNotFoundError):
            return  # the Hub is there: whoever loads the model gets its answer
        raise ModelNotFoundError(hub_sentence(error, name)) from error


def read_config(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a folder or of a name on the Hub. No code of the checkpoint is run.

    Args:
        revision: Commit, tag or branch on the Hub.

    Raises:
        ModelNotFoundError: If there is none.
        ModelError: If it is damaged (a ConfigError), or transformers does not know the model type.
    """
    find_model(name, revision=revision)
    try:
        # False, not transformers' default, which asks on the terminal whether to run the checkpoint's code
        return load_config(name, trust_remote_code=False, revision=revision)
    except OSError as error:
        raise ModelNotFoundError(f"{name!r} has no config that can be read: {one_line(error)}") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise ModelError(f"the config of {name!r} cannot be read: {one_line(error)}") from error


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of a name on the Hub. No code of the checkpoint is run.

    Args:
        **options: Of `AutoTokenizer.from_pretrained`; `trust_remote_code=True` allows code.

    Raises:
        ModelNotFoundError: If there is no such folder or repository.
        ConfigError: If it, or the model's config, which transformers reads as well, is damaged.
        OSError, ValueError: As transformers, for one that is not there.
    """
    revision = options.get("revision")
    find_model(name, file="tokenizer_config.json", revision=revision)
    # a repository of a tokenizer alone has no config
    with suppress(OSError):
        check_config(name, revision=revision)
    with config_errors(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, **{"trust_remote_code": False, **options})


def build_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The whole model that `config` describes, without weights (meta device).

    Raises:
        ValueError: If transformers has no model for it, or its values build none.
    """
    with torch.device("meta"), config_errors(config._name_or_path or type(config).__name__):
        # a copy: building writes into it
        return whole_auto_class(config).from_config(
            copy.deepcopy(config), dtype=config.dtype or torch.float32, trust_remote_code=False
        )


def language_class(config: PreTrainedConfig, name: str) -> Any:
    """The auto class that loads `config`'s model whole, if that is a language model.

    Raises:
        ModelError: If it is none, or transformers has no model for it.
    """
    try:
        auto_class = whole_auto_class(config)
    except ValueError as error:
        raise ModelError(f"{name!r} cannot be loaded: {error}") from error
    if not is_language_model(auto_class, config):
        kind = next(iter(config.architectures or []), None) or config.model_type
        raise ModelError(
            f"{name!r} ({kind}) is no language model that gives logits and a loss for text alone. Name one, such as "
            "a checkpoint of a ...ForCausalLM or ...ForConditionalGeneration class."
        )
    return auto_class


def check_language_model(name: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of `name`, after everything that can be refused without its weights.

    Args:
        revision: Commit, tag or branch on the Hub.

    Raises:
        ModelError: As `load_language_model`.
    """
    config = read_config(name, revision)
    try:
        model = build_empty(config)
    except ValueError as error:
        raise ModelError(f"{name!r} cannot be loaded: {one_line(error)}") from error
    _require_layers(model, name)
    language_class(config, name)
    return config


def load_language_model(name: str, *, checked: PreTrainedConfig | None = None, **options: Any) -> PreTrainedModel:
    """The model with all its towers.

    Args:
        name: A folder, or a name on the Hub.
        checked: What `check_language_model` returned, where it has been called already.
        **options: Of `from_pretrained`: `dtype`, `experts_implementation`, `device_map`, `revision`.

    Raises:
        ModelError: If it is no language model, dense, its experts bypass transformers' interface, or tensors of it
            are missing; an option that does not fit.
    """
    config = check_language_model(name, options.get("revision")) if checked is None else checked
    auto_class = language_class(config, name)
    try:
        model, found = auto_class.from_pretrained(name, trust_remote_code=False, output_loading_info=True, **options)
    except (ValueError, OSError) as error:
        raise ModelError(f"{name!r} cannot be loaded: {error}") from error
    if missing := sorted(map(str, found["missing_keys"])):
        raise ModelError(
            f"{name!r} lacks {missing[0]} ({len(missing)} tensors in all): they would be newly initialised. Name a "
            f"complete checkpoint of {type(model).__name__}."
        )
    _require_layers(model, name)  # a quantiser may have put something else in the experts' place
    return model


def _require_layers(model: PreTrainedModel, name: str) -> None:
    try:
        required_layers(model, dense="Name a Mixture-of-Experts model.")
    except ValueError as error:
        raise ModelError(f"{name!r}: {error}") from error
