"""Texts by domain: read from files, and the entry of each in `results.json` with bits per byte and perplexity."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_moe.data.bad_rows import RowError
from hf_moe.data.chat_text import ChatText, text_of
from hf_moe.data.corpus import DOMAIN_NAME, embedded_corpus
from hf_moe.data.formats import FINE_TUNING, read_rows
from hf_moe.data.sources import Source, read_records
from hf_moe.evaluation.bits_per_byte import BitsPerByte
from hf_moe.evaluation.errors import EvaluationError
from hf_moe.evaluation.results import Sample
from hf_moe.io.console import print_to_stderr

Tokenizer = Callable[[], PreTrainedTokenizerBase]
EMBEDDED = "embedded"
EMBEDDED_BYTES = 20_000


def read_domains(paths: Sequence[str], tokenizer: Tokenizer, *, on_bad_row: str = "error") -> dict[str, list[str]]:
    """Documents by domain, to be measured.

    Args:
        paths: Files and names on the Hub that the recipes read; each is a domain called after its file. A conversation
            is the text that the chat template makes of it. "embedded" stands for the held-out part of the text that
            every Python installation carries (code, docs, legal, readme, arithmetic).
        tokenizer: Gives the one whose chat template writes conversations; asked if there are any.
        on_bad_row: Whether rows that cannot be used are an `error`, or left out (`skip`).

    Raises:
        EvaluationError: If two files have one name.
        DataError: If a file cannot be read.
    """
    domains: dict[str, list[str]] = {}
    for path in paths:
        for name, documents in read_documents(path, tokenizer, on_bad_row=on_bad_row).items():
            if name in domains:
                raise EvaluationError(f"two texts are called {name!r}. Rename one of the files.")
            domains[name] = [_without_start(text, tokenizer) for text in documents]
    return domains


def read_documents(
    path: str, tokenizer: Tokenizer, *, on_bad_row: str = "error", by_field: bool = False
) -> dict[str, list[str]]:
    """Documents of one of `read_domains`' paths.

    Args:
        by_field: Whether a record's `domain` names its domain, where it has one.

    Raises:
        DataError: If it cannot be read.
    """
    if path == EMBEDDED and not Path(path).exists():
        corpus = embedded_corpus(train_bytes=EMBEDDED_BYTES, held_out_bytes=EMBEDDED_BYTES)
        return {name: list(domain.held_out) for name, domain in corpus.items()}
    source = Source(path)
    records, bad = read_records(source, on_bad_row=on_bad_row)
    data_set = read_rows(records, FINE_TUNING, bad)
    names: dict[int, str] = {}
    if by_field:
        data_set.unused = tuple(name for name in data_set.unused if name != "domain")
        for number, record in records:
            with bad.at(number):
                names[number] = _domain(record, source.domain)
    domains: dict[str, list[str]] = {}
    for number, text in data_set.apply(partial(text_of, tokenizer=cache(tokenizer))).items():
        domains.setdefault(names.get(number, source.domain), []).append(text)
    for remark in data_set.remarks():
        print_to_stderr(f"{path}: {remark}")
    return domains


def _domain(record: Mapping[str, Any], default: str) -> str:
    name = record["domain"] if record.get("domain") is not None else default
    if not isinstance(name, str) or not DOMAIN_NAME.fullmatch(name):
        raise RowError(f"'domain' must be 1 to 32 of the characters A-Z a-z 0-9 _ -, got {name!r}.")
    return name


def _without_start(text: str, tokenizer: Tokenizer) -> str:
    """Every document is measured after the token that begins a text, which some chat templates write as well."""
    if not isinstance(text, ChatText):
        return text
    return ChatText(text.removeprefix(tokenizer().bos_token or ""))


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
