"""Untrusted configs of any family: checked for what a small file could do to memory and time before transformers reads
them."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME

from hf_moe.io.error_text import one_line
from hf_moe.io.json_files import read_object
from hf_moe.loading.errors import MISFITS
from hf_moe.models.configuration_hf_moe import refuse_huge

_UNUSABLE = (*MISFITS, MemoryError, StrictDataclassError)


class ModelError(ValueError):
    """A model that cannot be used; says why and the way out."""


class ConfigError(ModelError):
    """A config that describes no model; names it, and what is wrong."""


def load_config(source: str | Path, **options: Any) -> PreTrainedConfig:
    """`AutoConfig.from_pretrained(source, **options)` after `check_config(source, **options)`.

    Raises:
        ConfigError: For a config that is damaged.
        OSError, ValueError: As `AutoConfig`, for one that is not there or of an unknown family.
    """
    found = check_config(source, **options)
    with config_errors(source):
        try:
            return AutoConfig.from_pretrained(source, **options)
        except ValueError as error:
            if found.get("model_type") not in CONFIG_MAPPING:
                raise
            raise _damaged(source, error) from error


def check_config(source: str | Path, **options: Any) -> dict[str, Any]:
    """Refuse a config whose numbers or lists would take all memory or time before anything is computed.

    To be called before a `from_pretrained` of `source`: a folder, or a name on the Hub (its config is downloaded).
    Returns what the file holds; nothing if a folder has none.

    Args:
        **options: Of that `from_pretrained`, where they say which file is read (`revision`, `local_files_only`).

    Raises:
        ConfigError: Naming the field; for a file that is no JSON object; for a `source` that is a file.
        OSError: If `source` is neither here nor on the Hub.
    """
    if os.path.isfile(source):
        raise ConfigError(f"{str(source)!r} is a file. Name the folder of a model, or a model on the Hub.")
    try:
        with config_errors(source):
            found = _read(source, options)
            for part in _objects(found):
                refuse_huge(part)
    except ValueError as error:
        raise error if isinstance(error, ConfigError) else _damaged(source, error) from error
    return found


@contextmanager
def config_errors(source: Any, what: str = "config") -> Iterator[None]:
    """Raise what a damaged config makes transformers and torch raise as one `ConfigError` in one line.

    Args:
        what: What of `source` is read.
    """
    try:
        yield
    except _UNUSABLE as error:
        raise _damaged(source, error, what) from error


def _read(source: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    if not os.path.isdir(source):
        return PreTrainedConfig.get_config_dict(source, **options)[0]
    try:
        return read_object(Path(source, CONFIG_NAME), allow_nan=True)
    except FileNotFoundError:  # the loader says what is missing, or finds an adapter
        return {}


def _objects(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config, and those of its parts (text, vision)."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _objects(value)


def _damaged(source: Any, error: Exception, what: str = "config") -> ConfigError:
    is_field = isinstance(error, StrictDataclassError)  # of a config, whatever was read
    cause = error.__cause__ if is_field and error.__cause__ else error
    kind = "" if isinstance(cause, ValueError) or not str(cause) else f"{type(cause).__name__}: "
    return ConfigError(
        f"the {'config' if is_field else what} of {str(source)!r:.200} cannot be used: {kind}{one_line(cause)}"
    )
