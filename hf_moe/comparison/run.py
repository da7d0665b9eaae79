"""Load two models one after the other and measure both on the same texts."""

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_moe.adapters.load_adapter import load_adapter
from hf_moe.comparison.models import Measurement, ModelComparison, compare_measurements
from hf_moe.comparison.text_probe import WINDOW, TextProbe
from hf_moe.data.encoding import context_of
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.experts.preferred import prefer_hf_moe
from hf_moe.loading.pretrained import DTYPES, ModelError, load_language_model, load_tokenizer, read_config

# folders that say nothing without the one that they are in
GENERAL_NAMES = ("model", "adapter", "merged", "output")


@dataclass(frozen=True)
class ModelChoice:
    """A model to load.

    Attributes:
        path: A model folder, or a name on the Hub. Quantised checkpoints load as they are.
        adapter: Folder or name of a PEFT adapter on it.
        dtype: One of `DTYPES`; auto is as saved.
        experts_implementation: Experts backend; None is hf_moe, or transformers' choice where that cannot run.
        device: Such as "cuda"; the GPU if there is one.
    """

    path: str
    adapter: str | None = None
    dtype: str = "auto"
    experts_implementation: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise EvaluationError(f"the dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")

    @property
    def name(self) -> str:
        """Name for reports: of a path the last part, so that no folder of this machine shows; two if it is general."""
        parts = [_last_part(self.path)]
        parts += [] if self.adapter is None else [f"with {_last_part(self.adapter)}"]
        parts += [] if self.dtype == "auto" else [f"in {self.dtype}"]
        parts += [] if self.experts_implementation is None else [f"on {self.experts_implementation}"]
        return " ".join(parts)


def compare_models(
    base: ModelChoice,
    new: ModelChoice,
    texts: Mapping[str, Sequence[str]],
    *,
    window: int | None = None,
    batch_size: int = 8,
    tokenizer: str | None = None,
    on_progress: Callable[[int, str, int], None] = lambda position, name, num_bytes: None,
) -> ModelComparison:
    """Load one model after the other, measure both on the same texts, and compare. Only one is in memory at a time.

    Args:
        texts: Documents by domain.
        window: Tokens of a window; None is that of `shared_window`.
        tokenizer: Folder or name of a tokenizer for both; None takes each model's own.
        on_progress: Called with 0 for the base or 1, the model's name, and the bytes of text that it has just read.

    Raises:
        EvaluationError: If a model, an adapter or a tokenizer cannot be used.
        OSError, ValueError: As the loaders of transformers.
    """
    window, _ = shared_window(base, new, window)
    tokenizers = _tokenizers(base, new, tokenizer)
    measured: list[Measurement] = []
    for position, (choice, own) in enumerate(zip((base, new), tokenizers, strict=True)):
        model = load_model(choice)
        probe = TextProbe(texts, own, window=window, batch_size=batch_size)
        measured.append(probe.measure(model, partial(on_progress, position, choice.name)))
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return compare_measurements(measured[0], measured[1], (base.name, new.name))


def shared_window(base: ModelChoice, new: ModelChoice, window: int | None = None) -> tuple[int, str]:
    """Tokens that both models read at once: `window`, or 1,024 or the smaller of their contexts.

    Returns:
        The number, and a sentence where one model could read more of the text than it will; empty otherwise.

    Raises:
        EvaluationError: If `window` is larger than a context.
        ModelError: If one is no model.
    """
    contexts = {choice.path: context_of(read_config(choice.path)) or math.inf for choice in (base, new)}
    smaller = min(contexts, key=lambda path: contexts[path])
    context, name = contexts[smaller], _last_part(smaller)
    if window is not None and window > context:
        raise EvaluationError(f"window must be at most {context:,}, the context of {name!r}, got {window:,}.")
    found = window or int(min(WINDOW, context))
    is_cut = window is None and found < min(WINDOW, max(contexts.values()))
    return found, f"Both models read {found:,} tokens at once, the context of {name}." if is_cut else ""


def load_model(choice: ModelChoice) -> nn.Module:
    """Load the model with its adapter, for evaluation.

    Raises:
        EvaluationError: If the model cannot be used, before its weights are read.
        AdapterError: As `load_adapter`.
    """
    options: dict[str, Any] = {"dtype": choice.dtype}
    if choice.experts_implementation is not None:
        options["experts_implementation"] = choice.experts_implementation
    device = choice.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu":
        options["device_map"] = device  # quantised checkpoints cannot be moved later
    try:
        model = load_language_model(choice.path, **options)
    except ModelError as error:
        raise EvaluationError(str(error)) from error
    if choice.experts_implementation is None:
        prefer_hf_moe(model)
    if choice.adapter is not None:
        return load_adapter(model, choice.adapter).eval()
    return model.eval()


def _tokenizers(base: ModelChoice, new: ModelChoice, both: str | None) -> list[PreTrainedTokenizerBase]:
    """Each model's own, or one for both."""
    return [_tokenizer(both or choice.path) for choice in (base, new)]


def _tokenizer(path: str) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(path)
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"{path!r} has no tokenizer that loads ({type(error).__name__}). Name one for both models with "
            "--tokenizer."
        ) from error


def _last_part(path: str) -> str:
    if not Path(path).exists():
        return path
    parts = Path(path).resolve().parts
    return "/".join(parts[-2:] if parts[-1] in GENERAL_NAMES else parts[-1:])
