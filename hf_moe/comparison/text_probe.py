"""Measure a model on texts by domain: routing, bits per byte, latency, and a sample of its weights."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_moe.comparison.models import Latency, Measurement, compare_measurements
from hf_moe.comparison.weights import sample_weights
from hf_moe.data.encoding import context_of
from hf_moe.data.tokenizer import encode_documents
from hf_moe.evaluation.bits_per_byte import BitsPerByte, bits_by_document
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.io.old_names import renamed_method
from hf_moe.observability.recording import record_routing
from hf_moe.observability.thresholds import MetricValue

WINDOW = 1024
TIMED_ROWS, TIMED_REPEATS = 4, 5
_TOGETHER = 8  # documents between two calls of on_progress


class TextProbe:
    """Measures models on the same texts.

    Args:
        texts: Documents by domain.
        tokenizer: Of the models.
        window: Tokens that a model reads at once, at most; None is 1,024, or the model's context where that is less.
            Windows advance by half of it.
        batch_size: Windows at a time.
        time_it: Whether latency is measured.
        take_weights: Whether weights are sampled, for weight drift.

    Raises:
        EvaluationError: If there is no text, or a domain has none.
        TypeError: Of a subclass that overrides `figures`, the old name of `metrics`, which nothing calls.
    """

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        if "figures" in vars(cls):
            raise TypeError(
                f"{cls.__name__}.figures would never be called: rename it, and super().figures, to metrics."
            )

    def __init__(
        self,
        texts: Mapping[str, Sequence[str]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int | None = None,
        batch_size: int = 8,
        time_it: bool = True,
        take_weights: bool = True,
    ):
        if empty := [name for name, documents in texts.items() if not any(documents)]:
            raise EvaluationError(f"the domain {empty[0]!r} has no text. Give it some, or leave it out.")
        if not texts:
            raise EvaluationError("there is no text to measure on. Give at least one domain.")
        self.texts = {name: list(documents) for name, documents in texts.items()}
        self.tokenizer = tokenizer
        self.window, self.batch_size = window, batch_size
        self.time_it, self.take_weights = time_it, take_weights

    def measure(self, model: Any, on_progress: Callable[[int], None] = lambda num_bytes: None) -> Measurement:
        """Measure a model; its mode and weights are left as they are.

        Args:
            on_progress: Called with the bytes of text that were just read.

        Raises:
            ValueError: If the model has no MoE layer, or cannot read such windows.
        """
        window = self.window or min(WINDOW, context_of(model.config) or WINDOW)
        bits: dict[str, BitsPerByte] = {}
        with record_routing(model, detail="tokens") as trace:
            for name, documents in self.texts.items():
                with trace.domain(name):
                    bits[name] = self._bits(model, documents, window, on_progress)
        latency = {name: self._latency(model, name, window) for name in self.texts} if self.time_it else {}
        return Measurement(trace, bits, latency, sample_weights(model) if self.take_weights else {}, window)

    def metrics(self, base: Measurement, new: Measurement) -> Mapping[str, MetricValue]:
        """Metrics of two measurements that `RoutingThresholds` can bound, by name."""
        return compare_measurements(base, new).metrics()

    figures = renamed_method("figures", "metrics")

    def _bits(self, model: Any, documents: list[str], window: int, on_progress: Callable[[int], None]) -> BitsPerByte:
        total = BitsPerByte(0.0, 0, 0)
        for begin in range(0, len(documents), _TOGETHER):
            part = [text for text in documents[begin : begin + _TOGETHER] if text]
            if part:
                found = bits_by_document(
                    model, self.tokenizer, part, window=window, stride=window // 2, batch_size=self.batch_size
                )
                total = sum(found, start=total)
            on_progress(sum(len(text.encode()) for text in part))
        return total

    @torch.no_grad()
    def _latency(self, model: Any, domain: str, window: int) -> Latency:
        tokens = [token for row in encode_documents(self.tokenizer, self.texts[domain]) for token in row]
        length = min(window, len(tokens))
        count = max(min(TIMED_ROWS, len(tokens) // length), 1)
        rows = torch.tensor(tokens[: count * length]).view(count, length).to(model.device)
        was_training = model.training
        model.eval()
        try:
            times = [_timed(model, rows) for _ in range(1 + TIMED_REPEATS)]
        finally:
            model.train(was_training)
        # a slower pass was held up by something else
        return Latency(min(times[1:]), rows.numel())


def _timed(model: nn.Module, rows: torch.Tensor) -> float:
    synchronize = torch.cuda.synchronize if rows.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    model(input_ids=rows, use_cache=False)
    synchronize()
    return time.perf_counter() - start
