"""Names that hf_moe relies on in transformers beyond its documented surface: looked up, and refused where unknown.

A renamed argument would land in somebody's `**kwargs` and change results without a word. So names are read from
signatures, and one that hf_moe does not know is an error.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import transformers

# of a forward's key/value cache, newest first: transformers 5.24 renamed it
CACHE_NAMES = ("cache", "past_key_values")

# what attention and caches of transformers read from a forward's keyword arguments: variable-length attention,
# continuous batching, flex attention, debugging
READ_BELOW_THE_MODEL = frozenset(
    {
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal"),
        *("max_seqlen_q", "max_seqlen_k"),  # of 5.17
        *("read_index", "write_index", "block_table", "logits_indices", "logits_processor_args"),
        "kernel_options",
        *("debug_io", "debug_io_dir", "prune_layers"),
    }
)

# says which row of a pack a token is of, as position_ids do, which are read; alone it would be lost
REPEATS_POSITIONS = frozenset({"seq_idx"})


def cache_name(*functions: Callable[..., Any]) -> str:
    """The one name of `CACHE_NAMES` under which all `functions` take their cache.

    Raises:
        ImportError: If there is none.
    """
    for name in CACHE_NAMES:
        if all(name in inspect.signature(function).parameters for function in functions):
            return name
    raise unknown(f"{functions[0].__qualname__} takes a key/value cache under none of the names {CACHE_NAMES}")


def check_parameters(relied_on: Mapping[Callable[..., Any], tuple[str, ...]]) -> None:
    """Raise ImportError if a function of transformers lacks a parameter that hf_moe passes."""
    for function, names in relied_on.items():
        parameters = inspect.signature(function).parameters
        missing = [name for name in names if name not in parameters]
        if missing:
            raise unknown(f"{function.__qualname__} has no parameter {', '.join(missing)}")


def unknown(what: str) -> ImportError:
    """The error for a transformers that is not what hf_moe was written against."""
    return ImportError(
        f"transformers {transformers.__version__} is not known to hf_moe: {what}. Install a transformers that hf_moe "
        "was tested with (5.17 to 5.24), or a newer hf_moe."
    )


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache of a forward that takes it under both names, since callers of either age exist.

    Raises:
        ValueError: If both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("Give one key/value cache: as cache (transformers 5.24 and newer) or as past_key_values.")
    return past_key_values if cache is None else cache


def refuse_unread(model: Any, arguments: Mapping[str, Any], has_positions: bool) -> None:
    """Raise TypeError naming the keyword arguments that neither the model nor what runs below it reads."""
    # `capture_outputs` takes these out of a forward's arguments
    recorded = {f"output_{name}" for name in type(model)._can_record_outputs}
    read = READ_BELOW_THE_MODEL | recorded | (REPEATS_POSITIONS if has_positions else frozenset())
    if unread := sorted(set(arguments) - read):
        raise TypeError(
            f"{type(model).__name__} reads no argument {', '.join(map(repr, unread))}. "
            "Leave it out, or correct its name."
        )
