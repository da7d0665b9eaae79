"""Bits per byte: how many bits a model needs to write down a byte of unseen text. Comparable between tokenizers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe.data.tokenizer import encode_documents


@dataclass(frozen=True)
class BitsPerByte:
    """Total information of a text under a model. `bytes` are those of the UTF-8 text itself, exactly."""

    bits: float
    bytes: int
    tokens: int

    def __add__(self, other: "BitsPerByte") -> "BitsPerByte":
        return BitsPerByte(self.bits + other.bits, self.bytes + other.bytes, self.tokens + other.tokens)

    @property
    def value(self) -> float:
        return self.bits / self.bytes

    @property
    def perplexity(self) -> float:
        """Per token, so comparable only under one tokenizer."""
        return 2 ** (self.bits / self.tokens)


@dataclass(frozen=True)
class _Window:
    document: int
    tokens: Sequence[int]
    first_target: int  # index in `tokens` of the first token that no earlier window predicted


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    window: int,
    stride: int,
    batch_size: int = 16,
) -> BitsPerByte:
    """Measure every token of every document once, each document on its own, after a beginning-of-text token.

    A document longer than `window` tokens is read in windows that advance by `stride`; a token is predicted from at
    least `window - stride` tokens before it, where the document has them.

    Raises:
        ValueError: If `stride` is not in [1, window - 1], the window exceeds the model's context, the documents hold
            no text, or the tokenizer has neither a bos nor an eos token.
    """
    parts = bits_by_document(model, tokenizer, documents, window=window, stride=stride, batch_size=batch_size)
    return sum(parts, start=BitsPerByte(0.0, 0, 0))


@torch.no_grad()
def bits_by_document(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    *,
    window: int,
    stride: int,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[BitsPerByte]:
    """`bits_per_byte` of every document by itself, in order; an empty one has 0 of everything.

    Args:
        progress: What a bar is called; None shows none.

    Raises:
        ValueError: As `bits_per_byte`.
    """
    _check(model, documents, window, stride)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the tokenizer has no bos_token and no eos_token to begin a text with. Set one of them.")
    encoded = encode_documents(tokenizer, documents)
    windows = [part for i, tokens in enumerate(encoded) for part in _windows(i, [start, *tokens], window, stride)]
    nats = [0.0] * len(documents)
    was_training = model.training
    model.eval()
    try:
        batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
        for batch in tqdm(batches, desc=progress, disable=True if progress is None else None):
            for part, value in zip(batch, _nats(model, batch, padding=start), strict=True):
                nats[part.document] += value
    finally:
        model.train(was_training)
    return [
        BitsPerByte(value / math.log(2), len(text.encode()), len(tokens))
        for value, text, tokens in zip(nats, documents, encoded, strict=True)
    ]


def _check(model: PreTrainedModel, documents: Sequence[str], window: int, stride: int) -> None:
    if not 1 <= stride < window:
        raise ValueError(f"stride must be in [1, {window - 1}] (below the window of {window} tokens), got {stride}.")
    # a model without learned or scaled positions declares none
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and window > limit:
        raise ValueError(f"window must be at most {limit} (the model's max_position_embeddings), got {window}.")
    if not any(documents):
        raise ValueError(
            f"the {len(documents)} documents hold no text: there is no byte to measure. Give held-out text."
        )


def _windows(document: int, tokens: Sequence[int], window: int, stride: int) -> Iterator[_Window]:
    """Windows that together predict tokens[1:], each once."""
    predicted = 1
    for begin in range(0, len(tokens), stride):
        end = min(begin + window, len(tokens))
        if end > predicted:
            yield _Window(document, tokens[begin:end], predicted - begin)
            predicted = end


def _nats(model: PreTrainedModel, batch: list[_Window], *, padding: int) -> list[float]:
    """Negative log-likelihood of each window's new tokens: logits in float32, the sum in float64."""
    length = max(len(part.tokens) for part in batch)
    input_ids = torch.full((len(batch), length), padding)
    attention_mask = torch.zeros_like(input_ids)
    targets = torch.full_like(input_ids, -100)
    for row, part in enumerate(batch):
        tokens = torch.tensor(part.tokens)
        input_ids[row, : len(tokens)] = tokens
        attention_mask[row, : len(tokens)] = 1
        targets[row, part.first_target : len(tokens)] = tokens[part.first_target :]
    device = model.device
    logits: Tensor = model(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
    ).logits
    nats = F.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets[:, 1:].flatten().to(device), ignore_index=-100, reduction="none"
    )
    return nats.double().view(len(batch), -1).sum(-1).tolist()
