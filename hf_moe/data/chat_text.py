"""Conversations as text: what a chat template writes, and where in it the assistant speaks."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_moe.data.bad_rows import DataError, RowError
from hf_moe.data.formats import Chat, Instruction, Pair, Row, Text

Messages = Sequence[Mapping[str, Any]]
Span = tuple[int, int]
CHAT_TEMPLATE = "chat_template.jinja"
"""The file of a model's folder, or an adapter's, that holds its chat template."""
# of Unicode's private use: no text has it
MARK = "\uf4c1\uf4c2"


def read_chat_template(path: str | Path) -> str:
    """A chat template from a file.

    Raises:
        DataError: If it cannot be read, or is not UTF-8 text.
    """
    what = f"the chat template {str(path)!r}"
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{what} cannot be read: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is not UTF-8 text (byte {error.start}). Name a Jinja file.") from error


class ChatText(str):
    """A conversation as its chat template writes it: control tokens in it are tokens, not text that spells them."""

    __slots__ = ()


class ChatWriter:
    """A tokenizer's chat template.

    Args:
        options: Arguments of the template for every conversation; a row's own come first.

    Raises:
        DataError: If the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None):
        self.tokenizer, self.options = tokenizer, dict(options or {})
        if tokenizer.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template, which conversations need. Give one (chat_template), or put it "
                "into the model's folder as chat_template.jinja."
            )

    def marks_turns(self, chat: Chat) -> bool:
        """Return whether the template marks the assistant's turns with `{% generation %}`."""
        template = self.tokenizer.get_chat_template(tools=chat.tools)
        return re.search(r"{%-?\s*generation\s*-?%}", template) is not None

    def apply(self, chat: Chat, messages: Messages | None = None, **options: Any) -> Any:
        """`apply_chat_template` with the conversation's tools and options.

        Raises:
            RowError: If the template refuses it.
            DataError: If the template itself is broken.
        """
        from jinja2 import TemplateError, TemplateSyntaxError

        written = list(chat.messages if messages is None else messages)
        try:
            return self.tokenizer.apply_chat_template(
                written, tools=chat.tools, **{**self.options, **chat.options, **options}
            )
        except TemplateSyntaxError as error:  # no row can mend it
            raise DataError(f"the chat template is not valid Jinja: {error} (line {error.lineno}).") from error
        except (TemplateError, KeyError, TypeError, AttributeError, ValueError) as error:
            beginning = json.dumps(written, default=str, ensure_ascii=False)[:200]
            raise RowError(f"the chat template refuses the messages ({error}): {beginning}") from error

    def text(self, chat: Chat, messages: Messages | None = None, *, prompt: bool = False) -> str:
        """The text that the template writes, for `prompt` with the beginning of the assistant's next turn.

        Raises:
            RowError: If the template refuses it, or writes a list of parts as Python shows it.
        """
        written = self.apply(chat, messages, tokenize=False, add_generation_prompt=prompt)
        contents = [message.get("content") for message in chat.messages]
        if any(isinstance(content, list) and content and str(content) in written for content in contents):
            raise RowError("the chat template takes a content that is a string, not a list of parts. Write strings.")
        return written

    def prompt_end(self, chat: Chat) -> Span:
        """The span of the completion in the text.

        Raises:
            RowError: If the template writes the prompt differently when the completion follows.
        """
        whole = self.text(chat)
        prompt = self.text(chat, chat.messages[: chat.prompt], prompt=True)
        if not whole.startswith(prompt):
            raise RowError(
                "the chat template writes the prompt differently when the completion follows, so that they cannot be "
                "told apart. Use the 'messages' format."
            )
        return len(prompt), len(whole)

    def assistant_turns(self, chat: Chat) -> list[Span]:
        """The spans of the assistant's turns in the text, each with the token that ends it.

        A turn begins where the prompt for it ends, and ends where the text of the messages up to it does. Where a
        template writes a message otherwise once others follow (Qwen3 leaves out earlier reasoning), marks in the
        messages tell, with which it must write the same but for the marks.

        Raises:
            RowError: If a turn cannot be found.
        """
        whole = self.text(chat)
        spans: list[Span] = []
        for index, message in enumerate(chat.messages):
            if message["role"] == "assistant":
                turn = _Turn(self, chat, whole, index)
                begin, end = turn.begin(spans[-1][1] if spans else 0), turn.end()
                if begin is None or end is None or not (spans[-1][1] if spans else 0) <= begin <= end:
                    raise RowError(
                        f"where the assistant speaks in message {index + 1} cannot be told from what the template "
                        "writes. Give one that marks it with {% generation %} (chat_template), or set "
                        "assistant_only: false."
                    )
                spans.append((begin, end))
        return spans

    def added_tokens(self) -> list[str]:
        return [token.content for token in self.tokenizer.added_tokens_decoder.values()]

    def special_tokens(self) -> list[str]:
        """Longest first."""
        added = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return sorted({*added, *self.tokenizer.all_special_tokens}, key=len, reverse=True)


class _Turn:
    """One of the assistant's turns in the text of a whole conversation."""

    def __init__(self, writer: ChatWriter, chat: Chat, whole: str, index: int):
        self.writer, self.chat, self.whole, self.index = writer, chat, whole, index

    def begin(self, least: int) -> int | None:
        prompt = self._text(self.index, prompt=True)
        if prompt is not None and self.whole.startswith(prompt):
            return len(prompt)
        header = self._header()
        if not header:
            return None
        before = self._text(self.index)
        if before is not None and self.whole.startswith(before):
            return _after(header, self.whole, len(before), len(before))
        # the first header after the message before
        before_end = least if self.index == 0 else self._place(self.chat.messages, self.index - 1, self.whole)
        own_end = self._place(self.chat.messages, self.index, self.whole)
        if before_end is None or own_end is None:
            return None
        return _after(header, self.whole, max(before_end, least), own_end)

    def end(self) -> int | None:
        alone = self._text(self.index + 1)
        if alone is None:
            return None
        if self.whole.startswith(alone):
            return self._without_spaces(len(alone))
        # from the last word of the turn on the text must be what it is when the turn is the last
        here = self._place(self.chat.messages, self.index, self.whole)
        there = self._place(self.chat.messages[: self.index + 1], self.index, alone)
        if here is None or there is None:
            return None
        rest = alone[there:]
        if self.whole.startswith(rest, here):
            return self._without_spaces(here + len(rest))
        return self._other_end(rest.rstrip(), here)

    def _other_end(self, rest: str, here: int) -> int | None:
        """The end of a turn whose last token is another one when the turn is the last: gpt-oss has two, Phi-3 ends
        the whole text with one more."""
        specials = self.writer.special_tokens()
        last = next((token for token in specials if rest.endswith(token)), None)
        if last is None or not self.whole.startswith(rest.removesuffix(last), here):
            return None
        place = here + len(rest.removesuffix(last))
        before = self._text(self.index)
        if before is not None and before.endswith(last):  # it ends every text
            return self._without_spaces(place)
        other = next((token for token in specials if self.whole.startswith(token, place)), None)
        return None if other is None else place + len(other)

    def _text(self, count: int, *, prompt: bool = False) -> str | None:
        """The text of the first messages; None if the template refuses these alone."""
        if not count:
            return None
        try:
            return self.writer.text(self.chat, self.chat.messages[:count], prompt=prompt)
        except RowError:
            return None

    def _header(self) -> str:
        """The text with which the template begins an assistant's turn."""
        question = [{"role": "user", "content": "?"}]
        before = self.writer.text(self.chat, question)
        prompt = self.writer.text(self.chat, question, prompt=True)
        return prompt.removeprefix(before) if prompt.startswith(before) else ""

    def _place(self, messages: Messages, index: int, text: str) -> int | None:
        """The place in `text`, which is that of the messages, where the content of one ends, or else the name of its
        tool call; None if it cannot be found."""
        marked = _marked(messages[index])
        if marked is None:
            return None
        try:
            written = self.writer.text(self.chat, [*messages[:index], marked, *messages[index + 1 :]])
        except RowError:
            return None
        # a name may come again with the tool's answer
        return written.find(MARK) if MARK in written and written.replace(MARK, "") == text else None

    def _without_spaces(self, end: int) -> int:
        """The end of the turn at the token that ends it: what follows it is the template's. GLM has none, and stops
        where the token comes that begins the next message."""
        stripped = self.whole[:end].rstrip()
        specials = self.writer.special_tokens()
        if stripped.endswith(tuple(specials)):
            return len(stripped)
        if stripped.endswith(tuple(self.writer.added_tokens())):
            return end
        return end + next((len(token) for token in specials if self.whole.startswith(token, end)), 0)


def _after(header: str, text: str, begin: int, end: int) -> int | None:
    """The end of a header that begins in text[begin : end + 1]. Its own end may be missing (an opened thought of which
    nothing is left), but no more than half of it."""
    ends = [match.end() for match in re.finditer(r"[\s>\]|｜]+", header)]
    for length in sorted({*ends, len(header)}, reverse=True):
        place = text.find(header[:length], begin)
        if begin <= place <= end and 2 * length >= len(header):
            return place + length
    return None


def _marked(message: Mapping[str, Any]) -> dict[str, Any] | None:
    """The message with a mark after its content, or after the name of its first tool call."""
    content = message.get("content")
    if isinstance(content, str) and content.strip():
        core = content.rstrip()
        return {**message, "content": core + MARK + content[len(core) :]}
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls and isinstance(calls[0], Mapping):
        call = calls[0].get("function", calls[0])
        if isinstance(call, Mapping) and isinstance(call.get("name"), str):
            named = {**call, "name": call["name"] + MARK}
            first = {**calls[0], "function": named} if "function" in calls[0] else named
            return {**message, "tool_calls": [first, *calls[1:]]}
    return None


def text_of(row: Row, tokenizer: Callable[[], PreTrainedTokenizerBase]) -> str:
    """A row as one text, to be measured or traced whole. A conversation is a `ChatText`; the token that begins a text
    is left out of it where the tokenizer writes one by itself.

    Args:
        tokenizer: Gives it, for conversations and instructions.

    Raises:
        RowError: If the chat template refuses it.
        DataError: If there is none.
    """
    if isinstance(row, Text):
        return row.text
    if isinstance(row, Instruction):
        row = plain_or_chat(row, tokenizer())
    if isinstance(row, Pair):
        return row.prompt + row.completion
    if not isinstance(row, Chat):
        raise RowError("a preference is two texts, not one.")
    text = ChatWriter(tokenizer()).text(row)
    starts_itself = tokenizer()("a")["input_ids"][:1] == [tokenizer().bos_token_id]
    return ChatText(text.removeprefix(tokenizer().bos_token) if starts_itself else text)


def plain_or_chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> Row:
    """An instruction as a conversation, or as plain text if the tokenizer has no chat template."""
    if not isinstance(row, Instruction):
        return row
    return row.pair() if tokenizer.chat_template is None else row.chat()
