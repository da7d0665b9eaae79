"""The entry of a domain of text in `results.json`, with bits per byte and perplexity."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hf_moe.evaluation.bits_per_byte import BitsPerByte
from hf_moe.evaluation.results import Sample


def domain_entry(
    documents: Sequence[str], parts: Sequence[BitsPerByte], *, window: int, stride: int
) -> tuple[dict[str, Any], list[Sample]]:
    """Entry of one domain in `results.json` (its metrics, its size), and the samples behind it.

    Bits per byte are bits of all tokens over the UTF-8 bytes of the text itself; perplexity is per token, so
    comparable only under one tokenizer. The standard error is that of a ratio of sums over documents.

    Args:
        documents: The texts of the domain.
        parts: Of each, by `bits_by_document` with this `window` and `stride`.
    """
    total = sum(parts, start=BitsPerByte(0.0, 0, 0))
    metrics = {
        "bits_per_byte": _metric(total.value, ratio_stderr([(part.bits, part.bytes) for part in parts])),
        "perplexity": _metric(total.perplexity, None),
    }
    entry = {
        "metrics": metrics,
        "documents": len(documents),
        "bytes": total.bytes,
        "tokens": total.tokens,
        "window": window,
        "stride": stride,
        "documents_sha256": documents_sha256(map(text_sha256, documents)),
    }
    samples = [
        {
            "doc": text_sha256(text),
            "filter": "none",
            # as lm-eval keeps it: log-likelihood in nats, and what it is divided by
            "values": {"bits_per_byte": [-part.bits * math.log(2), part.bytes]},
            "response": None,
        }
        for text, part in zip(documents, parts, strict=True)
    ]
    return entry, samples


def _metric(value: float, stderr: float | None) -> dict[str, Any]:
    return {"value": value if math.isfinite(value) else None, "stderr": stderr, "higher_is_better": False}


def ratio_stderr(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of sum(a) / sum(b) over independent pairs, by linearisation; None for fewer than two.

    Source: Cochran, Sampling Techniques (1977), section 6.3, without the finite population's correction.
    """
    if len(pairs) < 2:
        return None
    above, below = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    residual = above - above.sum() / below.sum() * below
    stderr = float((residual.square().sum() / (len(pairs) - 1) * len(pairs)).sqrt() / below.sum())
    return stderr if math.isfinite(stderr) else None


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def documents_sha256(digests: Iterable[str]) -> str:
    """One digest of documents in order, from the digest of each."""
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
