"""What the architecture relies on in transformers beyond its documented surface, checked when it is first imported.

A renamed argument would land in somebody's `**kwargs` and change results without a word. So names are read from
signatures, and one that hf_moe does not know is an error.
"""

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

# of a forward's key/value cache, newest first; 5.24 renamed it
CACHE_NAMES = ("cache", "past_key_values")

# what attention and caches of transformers read from a forward's keyword arguments: variable-length attention,
# continuous batching, flex attention, debugging
READ_BELOW_THE_MODEL = frozenset(
    {
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "is_causal"),
        *("read_index", "write_index", "block_table", "logits_indices", "logits_processor_args"),
        "kernel_options",
        *("debug_io", "debug_io_dir", "prune_layers"),
    }
)

_RELIED_ON: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...] = (
    (create_causal_mask, ("config", "inputs_embeds", "attention_mask", "position_ids")),
    (Qwen3MoeAttention.forward, ("hidden_states", "position_embeddings", "attention_mask")),
    (use_experts_implementation, ("experts_class",)),
    (ExpertsInterface.register, ("key", "value")),
)


def cache_name(*functions: Callable[..., Any]) -> str:
    """The one name of `CACHE_NAMES` under which all `functions` take their cache.

    Raises:
        ImportError: If there is none.
    """
    for name in CACHE_NAMES:
        if all(name in inspect.signature(function).parameters for function in functions):
            return name
    raise _unknown(f"{functions[0].__qualname__} takes a key/value cache under none of the names {CACHE_NAMES}")


def check_signatures(relied_on: tuple[tuple[Callable[..., Any], tuple[str, ...]], ...] = _RELIED_ON) -> None:
    """Raise ImportError if a function of transformers lacks a parameter that hf_moe passes."""
    for function, names in relied_on:
        parameters = inspect.signature(function).parameters
        missing = [name for name in names if name not in parameters]
        if missing:
            raise _unknown(f"{function.__qualname__} has no parameter {', '.join(missing)}")


def _unknown(what: str) -> ImportError:
    return ImportError(
        f"transformers {transformers.__version__} is not known to hf_moe: {what}. Install a transformers that hf_moe "
        "was tested with (5.17 to 5.24), or a newer hf_moe."
    )


check_signatures()
CACHE = cache_name(create_causal_mask, Qwen3MoeAttention.forward)


def one_cache(past_key_values: Any, cache: Any) -> Any:
    """The cache of a forward that takes it under both names, whichever transformers calls it.

    Raises:
        ValueError: If both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError(
            "Give the key/value cache once: cache (transformers 5.24 and newer) or past_key_values, not both."
        )
    return past_key_values if cache is None else cache


def refuse_unread(model: Any, arguments: dict[str, Any], read: frozenset[str]) -> None:
    """Raise TypeError naming the keyword arguments that neither the model nor what runs below it reads."""
    unread = sorted(set(arguments) - read - READ_BELOW_THE_MODEL)
    if unread:
        raise TypeError(
            f"{type(model).__name__} reads no argument {', '.join(map(repr, unread))}. "
            "Leave it out, or correct its name."
        )
