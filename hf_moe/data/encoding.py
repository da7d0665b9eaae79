"""Rows to token ids and labels: loss on a whole text, on the completion, on the assistant's turns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from hf_moe.data.bad_rows import DataError, RowError
from hf_moe.data.chat_text import ChatWriter, Span, plain_or_chat
from hf_moe.data.formats import Chat, Pair, Row, Text

IGNORED = -100  # a label without loss, the value of transformers


@dataclass
class Example:
    """A tokenised record: ids, and labels with `IGNORED` where no loss is taken (never on the first token)."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Encoding:
    """Encoded rows of one source, with counts; `records`: how many rows; `remarks`: what was left out before."""

    examples: list[Example]
    tokens: int = 0
    loss_tokens: int = 0
    truncated: int = 0
    dropped: int = 0
    remarks: list[str] = field(default_factory=list)
    records: int = 0

    def __str__(self) -> str:
        text = f"{self.size()}, {self.tokens:,} tokens, loss on {self.loss_tokens:,}"
        if self.truncated:
            text += f"; {self.truncated:,} cut to the row length"
        if self.dropped:
            text += f"; {self.dropped:,} dropped, as the cut left no token with a loss"
        return "; ".join([text, *self.remarks])

    def size(self) -> str:
        """Records, and the pieces that long texts were cut into."""
        pieces = f" in {len(self.examples):,} pieces" if len(self.examples) > self.records else ""
        return f"{self.records:,} record{'s' if self.records != 1 else ''}{pieces}"


def cut(rows: Iterable[list[Example]], max_length: int, where: str, remarks: Iterable[str] = ()) -> Encoding:
    """Encoded rows, each cut to `max_length` tokens; texts are in pieces already.

    Args:
        where: The data set.
        remarks: What was left out of it.

    Raises:
        DataError: If nothing is left to learn from.
    """
    result = Encoding([], remarks=list(remarks))
    rows = list(rows)
    result.records = len(rows)
    for example in (example for examples in rows for example in examples):
        if len(example.input_ids) > max_length:
            result.truncated += 1
            example = Example(example.input_ids[:max_length], example.labels[:max_length])
        loss_tokens = sum(label != IGNORED for label in example.labels)
        if not loss_tokens:
            result.dropped += 1
            continue
        result.examples.append(example)
        result.tokens += len(example.input_ids)
        result.loss_tokens += loss_tokens
    if not result.examples:
        raise DataError(f"no row of {where!r} keeps a token to learn from in {max_length} tokens. Choose longer rows.")
    return result


class Encoder:
    """Turns rows into examples.

    Args:
        max_length: Texts are cut into pieces of so many tokens; None leaves them whole.
        assistant_only: Whether conversations are learned from the assistant's turns only, which the chat template
            marks with `{% generation %}` or which are found in its text.
        completion_only: Whether of prompt and completion the completion alone is learned.
        options: Arguments of the chat template; a row's own come first.

    Raises:
        DataError: If the tokenizer has no token to end a text with.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None,
        assistant_only: bool = True,
        completion_only: bool = True,
        options: Mapping[str, Any] | None = None,
    ):
        self.tokenizer, self.max_length, self.options = tokenizer, max_length, options
        self.assistant_only, self.completion_only = assistant_only, completion_only
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None or tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos_token to end a text with. Set tokenizer.eos_token.")
        self.start: int = start

    @cached_property
    def writer(self) -> ChatWriter:
        return ChatWriter(self.tokenizer, self.options)

    def encode(self, row: Row) -> list[Example]:
        """The examples of a row: of a text its pieces, else one.

        Raises:
            RowError: If it cannot be learned from.
            DataError: If no row can, as the tokenizer lacks what it takes.
        """
        row = plain_or_chat(row, self.tokenizer)
        if isinstance(row, Text):
            return self._text(row)
        if isinstance(row, Pair):
            return [self._pair(row)]
        if isinstance(row, Chat):
            return [self._chat(row)]
        raise RowError("preferences are learned by DPO alone.")

    def _text(self, row: Text) -> list[Example]:
        """Pieces of the row's length, each predicted from its second token on."""
        ids = [self.start, *self._ids(row.text), self.tokenizer.eos_token_id]
        length = self.max_length or len(ids)
        pieces = [ids[begin : begin + length] for begin in range(0, len(ids) - 1, length)]
        return [Example(piece, [IGNORED, *piece[1:]]) for piece in pieces]

    def _pair(self, row: Pair) -> Example:
        before = [self.start, *self._ids(row.prompt)]
        after = [*self._ids(row.completion), self.tokenizer.eos_token_id]
        kept = [IGNORED] * len(before) if self.completion_only else [IGNORED, *before[1:]]
        return Example(before + after, kept + after)

    def _chat(self, row: Chat) -> Example:
        completion = row.messages[row.prompt or 0 :]
        by_turns = self.assistant_only and (
            row.prompt is None or any(message["role"] != "assistant" for message in completion)
        )
        if by_turns and not any(message["role"] == "assistant" for message in completion):
            raise RowError(
                "it has no message of the assistant to learn from. Add one, or learn whole conversations "
                "(assistant_only or assistant_only_loss: false)."
            )
        spans = None if row.prompt is None or not self.completion_only else [self.writer.prompt_end(row)]
        if by_turns and self.writer.marks_turns(row):
            return self._marked(row, spans)
        if by_turns:
            turns = self.writer.assistant_turns(row)
            spans = [turn for turn in turns if spans is None or turn[0] >= spans[0][0]]
        return self._spans(self.writer.text(row), spans)

    def _marked(self, row: Chat, spans: list[Span] | None) -> Example:
        encoded = self.writer.apply(
            row, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={"verbose": False}
        )
        ids = list(encoded["input_ids"])
        if not any(encoded["assistant_masks"]):
            raise RowError("the chat template marks no token of its assistant's turns with {% generation %}.")
        labels = [token if mine else IGNORED for token, mine in zip(ids, encoded["assistant_masks"], strict=True)]
        if spans is not None:
            inside = self._spans(self.writer.text(row), spans).labels
            labels = [IGNORED if other == IGNORED else label for label, other in zip(labels, inside, strict=True)]
        return Example(ids, [IGNORED, *labels[1:]])

    def _spans(self, text: str, spans: list[Span] | None) -> Example:
        """The text encoded once; a token that holds a character of a span is learned, all are without spans."""
        if spans is None:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            return Example(list(ids), [IGNORED, *ids[1:]])
        if not self.tokenizer.is_fast:
            raise DataError(
                f"{type(self.tokenizer).__name__} does not say what text its tokens stand for, so that loss on a "
                "part of a conversation cannot be taken. Set assistant_only: false, or use a fast tokenizer."
            )
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        learned = _inside(encoded["offset_mapping"], spans)
        labels = [token if mine else IGNORED for token, mine in zip(ids, learned, strict=True)]
        return Example(ids, [IGNORED, *labels[1:]])

    def _ids(self, text: str) -> list[int]:
        # verbose=False: texts longer than the context are cut, not forgotten
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _inside(offsets: Iterable[Span], spans: list[Span]) -> list[bool]:
    return [any(begin < end and start < end and stop > begin for begin, end in spans) for start, stop in offsets]


def context_of(config: PreTrainedConfig) -> int | None:
    """Most tokens that a model of this config takes at once, where it says so."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
