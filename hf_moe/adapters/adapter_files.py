"""Rules for the files of an adapter, applied before a model is touched.

A config may choose where factors go, how large they are and how they are scaled; what PEFT does beyond that (rewriting
the base, importing modules, reading other adapters) is refused. Each field has a rule, and one without a rule is
refused unless it is off.
"""

import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_moe.io.json_files import read_json
from hf_moe.models.checkpoint_files import FLOATING, CheckpointError, StoredTensor, read_headers

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LONGEST_CONFIG = 4 * 2**20
_LONGEST_PATTERN = 2**16
_LARGEST_INTEGER = 2**63


class AdapterError(ValueError):
    """An adapter that would not give what was saved, or that would change more than it may."""


@dataclass(frozen=True)
class AdapterFiles:
    """A checked folder.

    Attributes:
        config: The fields that have a rule and are set.
        tensors: Every tensor of the weights: name, shape and dtype.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: list[StoredTensor]

    @property
    def weights(self) -> str:
        return str(self.folder / WEIGHTS)

    @cached_property
    def num_values(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def check_adapter(folder: Path) -> AdapterFiles:
    """Check an adapter's files without a model.

    Raises:
        AdapterError: Naming the file, the value and the rule.
    """
    config = _read_config(folder)
    tensors = _read_weights(folder)
    return AdapterFiles(folder, _checked(folder, config, tensors), tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        below = sorted(str(found.parent) for found in folder.glob(f"*/{CONFIG}"))
        hint = f", such as {below[-1]!r}" if below else ""
        raise AdapterError(f"{str(folder)!r} has no {CONFIG}. Name the folder of an adapter{hint}.")
    config = read_bounded_json(path, _LONGEST_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{str(path)!r} must be a mapping with a peft_type. Save the adapter with save_pretrained.")
    return config


def read_bounded_json(path: Path, most_bytes: int) -> Any:
    """Raises AdapterError if the file is larger, cannot be read, or is no JSON."""
    if (size := path.stat().st_size) > most_bytes:
        raise AdapterError(f"{str(path)!r} has {size:,} bytes, at most {most_bytes:,} are read. Save it again.")
    try:
        return read_json(path, largest=most_bytes, allow_nan=True)  # NaN is refused by its field's name
    except OSError as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error.strerror}. Check its permissions.") from error
    except ValueError as error:
        raise AdapterError(f"{str(path)!r} is not valid JSON ({error}). Save the adapter again.") from error


def _read_weights(folder: Path) -> list[StoredTensor]:
    if not (folder / WEIGHTS).is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which can run code)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise AdapterError(f"{str(folder)!r} holds no {WEIGHTS}{pickled}. Save the adapter with save_pretrained.")
    try:
        stored = read_headers([str(folder / WEIGHTS)])
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    except OSError as error:
        raise AdapterError(f"{str(folder / WEIGHTS)!r} cannot be read: {error}.") from error
    if not any(math.prod(tensor.shape) for tensor in stored):
        raise AdapterError(f"{str(folder / WEIGHTS)!r} holds no tensor. Save the adapter again.")
    for tensor in stored:
        if not tensor.floating:
            raise AdapterError(
                f"{tensor.where} has dtype {tensor.dtype}; an adapter's are {', '.join(sorted(FLOATING))}. Save the "
                "adapter again in one of them."
            )
    return stored


@dataclass(frozen=True)
class _Limits:
    """Sizes that the tensors of the file explain: `size`, the largest in a shape, and `entries`, the longest list."""

    size: int
    entries: int


@dataclass(frozen=True)
class _Rule:
    """`says` completes "FIELD in FILE must be"; `{size}` and `{entries}` stand for the limits."""

    holds: Callable[[Any, _Limits], bool]
    says: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_size(value: Any, limits: _Limits) -> bool:
    return _is_int(value) and 0 < value <= limits.size


def _is_number(value: Any) -> bool:
    if _is_int(value):
        return abs(value) < _LARGEST_INTEGER
    return isinstance(value, float) and math.isfinite(value)


def _is_pattern(value: Any) -> bool:
    if not isinstance(value, str) or len(value) > _LONGEST_PATTERN:
        return False
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_list(value: Any, limits: _Limits, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) <= limits.entries and all(map(holds, value))


def _is_mapping(value: Any, limits: _Limits, key: Callable[[Any], bool], holds: Callable[[Any], bool]) -> bool:
    if not isinstance(value, Mapping) or len(value) > limits.entries:
        return False
    return all(key(name) and holds(each) for name, each in value.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_tokens(value: Any, limits: _Limits) -> bool:
    ids = list(value.values()) if isinstance(value, Mapping) else [value]
    return all(_is_list(each, limits, lambda token: _is_int(token) and token >= 0) for each in ids)


_TEXT = _Rule(lambda value, _: _is_text(value), "text")
_TEXTS = _Rule(lambda value, limits: _is_mapping(value, limits, _is_text, _is_text), "a mapping of texts")
_FLAG = _Rule(lambda value, _: isinstance(value, bool), "true or false")
_NUMBER = _Rule(lambda value, _: _is_number(value), "a finite number")
_SHARE = _Rule(lambda value, _: _is_number(value) and 0 <= value <= 1, "a finite number from 0 to 1")
_SIZE = _Rule(_is_size, "an integer from 1 to {size} (the largest size in the adapter's tensors)")
_SIZES = _Rule(
    lambda value, limits: _is_mapping(value, limits, _is_pattern, lambda size: _is_size(size, limits)),
    "a mapping of regular expressions to integers from 1 to {size} (the largest size in the adapter's tensors)",
)
_NUMBERS = _Rule(
    lambda value, limits: _is_mapping(value, limits, _is_pattern, _is_number),
    "a mapping of regular expressions to finite numbers",
)
_NAMES = _Rule(lambda value, limits: _is_list(value, limits, _is_text), "a list of at most {entries} names")
_TARGETS = _Rule(
    lambda value, limits: _is_pattern(value) or _is_list(value, limits, _is_text),
    "a list of at most {entries} names, or one regular expression",
)
_PATTERNS = _Rule(
    lambda value, limits: _is_pattern(value) or _is_list(value, limits, _is_pattern),
    "a regular expression, or a list of at most {entries}",
)
_POSITIONS = _Rule(
    lambda value, limits: _is_int(value) or _is_list(value, limits, _is_int),
    "an integer, or a list of at most {entries}",
)
_TOKENS = _Rule(_are_tokens, "a list of at most {entries} token ids, or a mapping of embeddings to such")
# how training started: not followed, because the values come from the file
_START = _Rule(lambda value, _: isinstance(value, bool) or _is_text(value), "true, false or a name")
_START_OPTIONS = _Rule(lambda value, _: isinstance(value, Mapping), "a mapping")
# starts that leave the base alone, and starts whose factors belong to a base that was changed before training
_HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_CHANGED_BASE = re.compile(r"(?i)pissa(_niter_[0-9]+)?|olora|corda|loftq|lora_ga")

_EVERY_METHOD = {
    "peft_type": _TEXT,
    "task_type": _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "peft_version": _TEXT,
    "auto_mapping": _TEXTS,
    "inference_mode": _FLAG,
}
_PLACES = {"target_modules": _TARGETS, "exclude_modules": _TARGETS, "modules_to_save": _NAMES}
_LAYERS = {"layers_to_transform": _POSITIONS, "layers_pattern": _PATTERNS}
_LYCORIS = {
    **_PLACES,
    **_LAYERS,
    "r": _SIZE,
    "rank_pattern": _SIZES,
    "alpha": _NUMBER,
    "alpha_pattern": _NUMBERS,
    "rank_dropout": _SHARE,
    "module_dropout": _SHARE,
    "init_weights": _START,
    "use_effective_conv2d": _FLAG,
}
_METHODS: dict[str, dict[str, _Rule]] = {
    "LORA": {
        **_PLACES,
        **_LAYERS,
        "target_parameters": _NAMES,
        "trainable_token_indices": _TOKENS,
        "alora_invocation_tokens": _TOKENS,
        "r": _SIZE,
        "rank_pattern": _SIZES,
        "lora_alpha": _NUMBER,
        "alpha_pattern": _NUMBERS,
        "lora_dropout": _SHARE,
        **dict.fromkeys(("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"), _FLAG),
        "bias": _Rule(lambda value, _: value == "none", "'none': biases of the base are not the adapter's to set"),
        "init_lora_weights": _Rule(
            lambda value, _: isinstance(value, bool) or value in _HARMLESS_STARTS,
            f"true, false or one of {', '.join(_HARMLESS_STARTS)}, which leave the base alone",
        ),
        **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config", "loftq_config"), _START_OPTIONS),
        # read by PEFT only where the field beside it is on, which is refused
        "megatron_core": _TEXT,
        "qalora_group_size": _NUMBER,
    },
    "IA3": {**_PLACES, "feedforward_modules": _TARGETS, "fan_in_fan_out": _FLAG, "init_ia3_weights": _START},
    "LOHA": _LYCORIS,
    "LOKR": {**_LYCORIS, "decompose_both": _FLAG, "decompose_factor": _NUMBER, "rank_dropout_scale": _FLAG},
    "ADAPTER_EXPERTS": {
        **dict.fromkeys(("num_adapter_experts", "adapter_width", "top_k"), _SIZE),
        "layers": _Rule(
            lambda value, limits: _is_list(value, limits, lambda layer: _is_int(layer) or _is_text(layer)),
            "a list of at most {entries} positions and names",
        ),
        "base_layers": _Rule(
            lambda value, limits: _is_mapping(value, limits, _is_text, lambda size: _is_int(size) and size > 0),
            "a mapping of at most {entries} names to sizes",
        ),
    },
}
# fields without a rule whose reason is worth a sentence
_REFUSED = {
    "megatron_config": "imports the module that megatron_core names, and no config selects code",
    "layer_replication": "builds a deeper model. Merge it and save the model",
    "kasa_config": "rewrites the weights of the base",
    "arrow_config": "reads other adapters",
}


def _checked(folder: Path, config: Mapping[str, Any], tensors: list[StoredTensor]) -> dict[str, Any]:
    path = str(folder / CONFIG)
    method = config["peft_type"]
    if method not in _METHODS:
        raise AdapterError(
            f"peft_type in {path!r} must be one of {', '.join(_METHODS)}, got {_excerpt(method)}. If you trust "
            "the file, load it with PEFT itself."
        )
    rules = {**_EVERY_METHOD, **_METHODS[method]}
    for field, number in _numbers(config):
        if not _is_number(number):
            raise AdapterError(f"{field} in {path!r} must be a finite number, got {_excerpt(number)}.")
    # a tensor without elements explains nothing: it may have any size at no cost
    largest = max((size for tensor in tensors if math.prod(tensor.shape) for size in tensor.shape), default=1)
    limits = _Limits(size=largest, entries=max(largest, len(tensors), 1024))
    checked = {}
    for field, value in config.items():
        if value is None:
            continue
        if field not in rules:
            if value not in (False, "", [], {}) or _is_number(value):
                why = _REFUSED.get(field, f"may do more than add {method} factors")
                raise AdapterError(f"{field[:80]} in {path!r} must be null, got {_excerpt(value)}: it {why}.")
        elif rules[field].holds(value, limits):
            checked[field] = value
        else:
            says = rules[field].says.format(size=limits.size, entries=limits.entries)
            raise AdapterError(f"{field} in {path!r} must be {says}, got {_excerpt(value)}.{_hint(field, value)}")
    return checked


def _excerpt(value: Any) -> str:
    """The start of a value that may be large, or deep."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def _hint(field: str, value: Any) -> str:
    if field == "init_lora_weights" and isinstance(value, str) and _CHANGED_BASE.fullmatch(value):
        return (
            f" With {value!r} training began from a changed base: save it as plain LoRA, with PEFT's "
            "path_initial_model_for_weight_conversion."
        )
    return ""


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Every number in the config, however deep, with the field that it is under."""
    rest = list(config.items())
    while rest:
        field, value = rest.pop()
        if isinstance(value, Mapping):
            rest += ((field, each) for each in value.values())
        elif isinstance(value, list):
            rest += ((field, each) for each in value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield field, value
