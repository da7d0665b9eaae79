"""Layouts of a data set's columns, each read as one of five kinds of row."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from hf_moe.data.bad_rows import BadRows, DataError, RowError

SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
    "tool": "tool", "observation": "tool",
}  # fmt: skip
"""ShareGPT's `from`, as roles."""
RESERVED = (
    "conversation", "messages", "tools", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
    "return_tensors", "return_dict", "tokenizer_kwargs", "return_assistant_tokens_mask",
)  # fmt: skip
"""Not for the template: these say what `apply_chat_template` does."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Pair:
    """A prompt and what follows it, as plain text."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        prompt: How many of the messages are the prompt, if the rest is what is learned; None if the assistant's turns
            are.
        tools: Schemas for the chat template.
        options: More arguments of the chat template.
    """

    messages: list[dict[str, Any]]
    prompt: int | None = None
    tools: list[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Instruction:
    """Alpaca's columns."""

    instruction: str
    input: str
    output: str

    def chat(self) -> Chat:
        """For a model with a chat template."""
        asked = f"{self.instruction}\n\n{self.input}" if self.input.strip() else self.instruction
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": self.output}]
        return Chat(messages, prompt=1)

    def pair(self) -> Pair:
        """For a model without one: the published prompt.

        Source: Taori et al. 2023, Stanford Alpaca, train.py.
        """
        given = self.input.strip()
        more = ", paired with an input that provides further context" if given else ""
        return Pair(
            f"Below is an instruction that describes a task{more}. Write a response that appropriately completes the "
            f"request.\n\n### Instruction:\n{self.instruction}\n\n"
            + (f"### Input:\n{self.input}\n\n" if given else "")
            + "### Response:",
            self.output,
        )


@dataclass(frozen=True)
class Preference:
    """Two answers, as texts or as messages; without a prompt it is what the two have in common."""

    prompt: Any
    chosen: Any
    rejected: Any
    tools: list[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


Row = Text | Pair | Chat | Instruction | Preference


@dataclass(frozen=True)
class Layout:
    """Columns that belong together, and how they are read."""

    needed: tuple[str, ...]
    also: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], Row]

    @property
    def columns(self) -> set[str]:
        return {*self.needed, *self.also}


class DataSet:
    """The rows of one data set that can be used so far.

    Attributes:
        where: What it is called.
        bad: The rows that cannot.
        rows: By number.
        total: Of both.
        unused: Columns that nothing reads.
    """

    def __init__(self, where: str, bad: BadRows, rows: dict[int, Row], total: int, unused: Sequence[str]):
        self.where, self.bad, self.rows, self.total, self.unused = where, bad, rows, total, tuple(unused)

    def apply(self, work: Callable[[Row], Result]) -> dict[int, Result]:
        """`work` on every row, by number; for rows that raise RowError there, or did before, `on_bad_row` holds.

        Raises:
            DataError: See `BadRows.settle`.
        """
        done = {}
        for number, row in self.rows.items():
            if number not in self.bad.reasons:
                with self.bad.at(number):
                    done[number] = work(row)
        self.bad.settle(self.total)
        return done

    def remarks(self) -> list[str]:
        """Sentences about what was left out."""
        columns = ", ".join(map(repr, self.unused))
        return [*([f"not used: the column{'s' * (len(self.unused) > 1)} {columns}"] if columns else []),
                *([str(self.bad)] if self.bad.reasons else [])]  # fmt: skip


def read_rows(records: Iterable[tuple[int, Mapping[str, Any]]], layouts: Sequence[Layout], bad: BadRows) -> DataSet:
    """Numbered records as rows, all of the layout that most of them have.

    Raises:
        DataError: If none has one; names the columns that are there.
    """
    numbered = list(records)
    total = len(numbered) + len(bad.reasons)
    found = Counter(layout for _, record in numbered if (layout := _layout(record, layouts)))
    if not found:
        if not numbered:
            bad.settle(total)
            raise DataError(f"the data set {bad.where!r} has no records. Give one with data, or leave it out.")
        raise _unknown(numbered[0][1], layouts, bad.where)
    layout = found.most_common(1)[0][0]
    rows: dict[int, Row] = {}
    for number, record in numbered:
        with bad.at(number):
            rows[number] = layout.read(record)
    _refuse_mixed(rows, bad)
    names = dict.fromkeys(name for _, record in numbered for name in record)
    return DataSet(bad.where, bad, rows, total, [name for name in names if name not in layout.columns])


def _layout(record: Mapping[str, Any], layouts: Sequence[Layout]) -> Layout | None:
    """The layout by the columns that are filled, else by those that are there."""
    for names in ({name for name, value in record.items() if value is not None}, set(record)):
        if found := next((layout for layout in layouts if set(layout.needed) <= names), None):
            return found
    return None


def _unknown(record: Mapping[str, Any], layouts: Sequence[Layout], where: str) -> DataError:
    wanted = ", or ".join(" and ".join(map(repr, layout.needed)) for layout in layouts)
    return DataError(
        f"the data set {where!r} has the columns {', '.join(map(repr, record))}; it needs {wanted}. "
        "Rename its columns."
    )


def _text(record: Mapping[str, Any]) -> Text:
    return Text(_filled(record, "text"))


def _conversation(record: Mapping[str, Any]) -> Chat:
    return Chat(_messages(record, "messages"), None, _tools(record), _options(record))


def _sharegpt(record: Mapping[str, Any]) -> Chat:
    turns = _list(record, "conversations")
    messages = [_turn(turn) for turn in turns]
    system = record.get("system")
    if isinstance(system, str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return Chat(_checked(messages, "conversations"), None, _tools(record), _options(record))


def _turn(turn: Any) -> dict[str, Any]:
    if isinstance(turn, Mapping) and "role" in turn:
        return dict(turn)
    if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
        raise RowError(f"'conversations' must be a list of 'from' and 'value', got {_short(turn)}.")
    if turn["from"] not in SPEAKERS:
        raise RowError(
            f"'from' must be one of {', '.join(SPEAKERS)}, got {turn['from']!r}. Write such turns as 'messages'."
        )
    return {"role": SPEAKERS[turn["from"]], "content": turn["value"]}


def _prompt(record: Mapping[str, Any]) -> Pair | Chat:
    prompt, completion = _parsed(record.get("prompt")), _parsed(record.get("completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        return Pair(prompt, _filled(record, "completion"))
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise RowError("'prompt' and 'completion' must be two strings or two lists of messages.")
    before, after = _messages(record, "prompt"), _messages(record, "completion")
    return Chat([*before, *after], len(before), _tools(record), _options(record))


def _instruction(record: Mapping[str, Any]) -> Instruction:
    given = record.get("input")
    if not isinstance(given, str | None):
        raise RowError(f"'input' must be a string, got {_short(given)}.")
    return Instruction(_filled(record, "instruction"), given or "", _filled(record, "output"))


def _preference(record: Mapping[str, Any], *, names: tuple[str, ...]) -> Preference:
    values = {name: _parsed(record.get(name)) for name in names}
    if missing := next((name for name, value in values.items() if value is None), None):
        raise RowError(f"it has no {missing!r}.")
    if "prompt" not in names and record.get("prompt") is not None:
        raise RowError("it has a 'prompt', and most rows have none. Write all rows one way.")
    if all(isinstance(value, str) for value in values.values()):
        read = {name: record[name] if name == "prompt" else _filled(record, name) for name in names}
    elif all(isinstance(value, list) for value in values.values()):
        read = {name: _messages(record, name) for name in names}
    else:
        raise RowError(f"{', '.join(map(repr, names))} must be all strings or all lists of messages.")
    return Preference(read.get("prompt"), read["chosen"], read["rejected"], _tools(record), _options(record))


_FOR_CHATS = ("tools", "chat_template_kwargs")
FINE_TUNING = (
    Layout(("messages",), _FOR_CHATS, _conversation),
    Layout(("prompt", "completion"), _FOR_CHATS, _prompt),
    Layout(("conversations",), ("system", *_FOR_CHATS), _sharegpt),
    Layout(("instruction", "output"), ("input",), _instruction),
    Layout(("text",), (), _text),
)
PREFERENCES = tuple(
    Layout(names, _FOR_CHATS, partial(_preference, names=names))
    for names in (("prompt", "chosen", "rejected"), ("chosen", "rejected"))
)


def _filled(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be a string, got {_short(value)}.")
    if not value.strip():
        raise RowError(f"{name!r} is empty.")
    return value


def _parsed(value: Any) -> Any:
    """A conversation that a column holds as JSON text, as in a .csv file; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    turns = isinstance(found, list) and found and all(isinstance(turn, dict) for turn in found)
    return found if turns and all({"role", "from"} & set(turn) for turn in found) else value


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    value = _parsed(record.get(name))
    if not isinstance(value, list) or not value:
        raise RowError(f"{name!r} must be a list of role and content, got {_short(value)}.")
    return value


def _messages(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    return _checked(_list(record, name), name)


def _checked(messages: list[Any], name: str) -> list[dict[str, Any]]:
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RowError(f"{name!r} must be a list of role and content, got {_short(message)} in it.")
        content = message.get("content")
        if not isinstance(content, str | list | None):
            raise RowError(f"a message's content must be a string or a list of parts, got {_short(content)}.")
    # as transformers does from some version on: before it, a template writes a null content as None
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _tools(record: Mapping[str, Any]) -> list[Any] | None:
    """A list of schemas, or the JSON text of one; each may be JSON text as well."""
    value = _json(record.get("tools"), "tools")
    if not isinstance(value, list | None):
        raise RowError(f"'tools' must be a list of schemas, got {_short(value)}.")
    tools = [_json(tool, "tools") for tool in value or []]
    if wrong := next((tool for tool in tools if not isinstance(tool, Mapping)), None):
        raise RowError(f"'tools' must be a list of schemas, got {_short(wrong)} in it.")
    return tools or None


def _options(record: Mapping[str, Any]) -> dict[str, Any]:
    value = _json(record.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    try:
        return check_options(value)
    except DataError as error:
        raise RowError(str(error)) from error


def check_options(value: Any) -> dict[str, Any]:
    """Arguments of a chat template.

    Raises:
        DataError: If they are no mapping, or would change what `apply_chat_template` does.
    """
    if not isinstance(value, Mapping) or any(not isinstance(name, str) for name in value):
        raise DataError(f"chat_template_kwargs must be a mapping of names to values, got {_short(value)}.")
    if wrong := sorted(set(value) & set(RESERVED)):
        raise DataError(f"chat_template_kwargs may not set {wrong[0]!r}: it is no variable of the template.")
    return dict(value)


def _json(value: Any, name: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name!r} is text and not valid JSON ({error}).") from error


def without_nulls(value: Any) -> Any:
    """A nested value without the keys that are null: Arrow gives every object the keys of all others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def _refuse_mixed(rows: Mapping[int, Row], bad: BadRows) -> None:
    """A template that reads texts as well as parts is rare, and one that does not may write a list as it is. What most
    rows have is meant."""
    for what, kinds_of, which in (
        ("an answer", _answers, "a list of messages"),
        ("a message's content", _contents, "a list of parts"),
    ):
        kinds = {number: kinds_of(row) for number, row in rows.items()}
        usual = {kind for kind, _ in Counter(kind for found in kinds.values() for kind in found).most_common(1)}
        for number, found in kinds.items():
            with bad.at(number):
                if found - usual:
                    raise RowError(f"{what} is sometimes a string and sometimes {which}. Write all rows one way.")


def _answers(row: Row) -> set[type]:
    return {type(row.chosen)} if isinstance(row, Preference) else set()


def _contents(row: Row) -> set[type]:
    messages: list[dict[str, Any]] = []
    if isinstance(row, Chat):
        messages = row.messages
    elif isinstance(row, Preference) and isinstance(row.chosen, list):
        messages = [*(row.prompt or []), *row.chosen, *row.rejected]
    return {type(message["content"]) for message in messages if message.get("content") is not None}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."
