"""The base model that a PEFT adapter names, to recognise an adapter where a model is expected."""

import os
import re
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from hf_moe.io.json_files import read_object
from hf_moe.loading.config_files import ModelError

CONFIG = "adapter_config.json"
_LARGEST_CONFIG = 4 * 2**20
_ON_THE_HUB = re.compile(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}")


class AdapterBaseError(ModelError):
    """An adapter in the place of a model, whose base cannot be told."""


def is_adapter(name: str) -> bool:
    """Whether a folder, or a name on the Hub that is in the cache, is a PEFT adapter and no model."""
    return _config_of(name) is not None


def base_of_adapter(name: str) -> str:
    """The base that an adapter records.

    Raises:
        AdapterBaseError: If it names none, or one that is not here; says what to name in its place.
    """
    path = _config_of(name)
    assert path is not None, "ask is_adapter first"
    way_out = f"Name its model, and the adapter as an option: MODEL --adapter {name}"
    try:
        base = read_object(path, largest=_LARGEST_CONFIG, allow_nan=True).get("base_model_name_or_path")
    except (OSError, ValueError) as error:
        raise AdapterBaseError(f"{name!r} is a PEFT adapter with a damaged {CONFIG} ({error}). {way_out}") from error
    if not isinstance(base, str) or not base:
        raise AdapterBaseError(f"{name!r} is a PEFT adapter, and does not say of which model. {way_out}")
    if not os.path.isdir(base) and not _ON_THE_HUB.fullmatch(base):
        raise AdapterBaseError(f"{name!r} is a PEFT adapter of {base!r:.200}, which is not here. {way_out}")
    return base


def _config_of(name: str) -> Path | None:
    """The config of an adapter; None for what is none, or a whole model with one inside."""
    folder = Path(name)
    if folder.is_dir():
        return folder / CONFIG if (folder / CONFIG).is_file() and not (folder / "config.json").exists() else None
    if os.path.exists(name) or not _ON_THE_HUB.fullmatch(name):
        return None
    found = [try_to_load_from_cache(name, file) for file in (CONFIG, "config.json")]
    return Path(found[0]) if isinstance(found[0], str) and not isinstance(found[1], str) else None
