"""Trace a model on texts, by domain and window by window."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe.observability.recording import Detail, record_routing
from hf_moe.observability.routing_trace import RoutingTrace


@dataclass(frozen=True)
class _Window:
    token_ids: list[int]
    texts: list[str]


@torch.no_grad()
def trace_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    domains: Mapping[str, Sequence[str]],
    *,
    detail: Detail = "counts",
    max_tokens: int | None = None,
    window: int = 512,
    batch_size: int = 8,
    store_text: bool = True,
    audit: bool = False,
    scratch: str | Path | None = None,
) -> RoutingTrace:
    """Run texts through the model in eval mode and record the routing.

    Each text is read on its own, in windows that do not overlap, with the special tokens that the tokenizer adds.

    Args:
        domains: Name -> texts.
        detail: As in `record_routing`.
        max_tokens: Stop reading a domain after so many tokens; None reads all.
        window: Tokens of one forward's rows, at most; cut to the model's `max_position_embeddings`.
        store_text: In tokens mode, keep the text of each token.
        audit: As in `record_routing`: neither ids nor text are kept.
        scratch: As in `record_routing`.

    Raises:
        ValueError: If a number is below 1, there is no domain, or a domain holds no token.
    """
    for name, value in (("window", window), ("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not domains:
        raise ValueError("there is no domain to trace. Give {name: [text, ...]}.")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    window = window if limit is None else min(window, limit)
    was_training = model.training
    model.eval()
    try:
        with record_routing(model, detail, audit=audit, scratch=scratch) as trace:
            for name, texts in domains.items():
                windows = _windows(tokenizer, name, texts, window, max_tokens)
                keeps_text = detail == "tokens" and store_text and not audit
                _run(model, tokenizer, trace, name, windows, batch_size, keeps_text)
    finally:
        model.train(was_training)
    return trace


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    trace: RoutingTrace,
    domain: str,
    windows: Iterator[_Window],
    batch_size: int,
    keeps_text: bool,
) -> None:
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    is_empty = True
    while batch := list(islice(windows, batch_size)):
        is_empty = False
        length = max(len(row.token_ids) for row in batch)
        input_ids = torch.full((len(batch), length), padding)
        mask = torch.zeros_like(input_ids)
        for number, row in enumerate(batch):
            input_ids[number, : len(row.token_ids)] = torch.tensor(row.token_ids)
            mask[number, : len(row.token_ids)] = 1
        texts = [row.texts for row in batch] if keeps_text else None
        with trace.domain(domain, token_texts=texts):
            model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False)
    if is_empty:
        raise ValueError(f"the texts of domain {domain!r} hold no token. Give text, or leave the domain out.")


def _windows(
    tokenizer: PreTrainedTokenizerBase, domain: str, texts: Sequence[str], window: int, max_tokens: int | None
) -> Iterator[_Window]:
    if isinstance(texts, str):
        raise ValueError(f"domain {domain!r} must be a list of texts, got one text. Write [text].")
    left = max_tokens
    for text in texts:
        token_ids, pieces = _tokenize(tokenizer, text)
        if left is not None:
            token_ids, pieces = token_ids[:left], pieces[:left]
            left -= len(token_ids)
        for begin in range(0, len(token_ids), window):
            yield _Window(token_ids[begin : begin + window], pieces[begin : begin + window])
        if left == 0:
            return


def _tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[str]]:
    """Ids, and the text that each token stands for; special tokens stand for none."""
    # long texts are cut into windows: no warning of the model's length
    if not tokenizer.is_fast:
        token_ids = tokenizer(text, verbose=False)["input_ids"]
        return token_ids, [tokenizer.decode([each]) for each in token_ids]
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    pieces, done = [], 0
    for _, end in encoded["offset_mapping"]:
        # a character of several tokens goes to the first of them, what lies between two tokens to the second
        pieces.append(text[done:end])
        done = max(done, end)
    return encoded["input_ids"], pieces
