"""Data for TRL's trainers: read, checked and written by the same code as for the other recipes.

TRL 1.16 would write and tokenise conversations itself, from columns that Arrow has given the keys of all rows, and a
row that the chat template refuses ends it in the middle. So SFT gets tokens and labels, which TRL takes as they are,
cuts and packs; DPO, which takes no tokens, gets conversations as JSON, of which Arrow knows no keys.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase, TrainingArguments

from hf_moe.data.bad_rows import DataError, RowError
from hf_moe.data.chat_text import ChatWriter
from hf_moe.data.encoding import Encoder, Encoding, Example, cut
from hf_moe.data.formats import FINE_TUNING, PREFERENCES, Chat, Instruction, Layout, Pair, Preference, Row, Text
from hf_moe.data.packing import pad_examples
from hf_moe.data.sources import Source, hold_out, read_source
from hf_moe.finetuning.arguments import RecipeError, SourceArguments
from hf_moe.finetuning.domains import DomainTexts
from hf_moe.io.console import print_to_stderr

# options of SFTConfig about data that is read and tokenised here, with the values that change nothing
NOT_OURS = {"chat_template_path": None, "dataset_kwargs": None, "dataset_text_field": "text", "eos_token": None}

_MEASURED = 1024  # tokens of a measured example where max_length sets no limit: TRL's default of it


class TrlDataArguments(SourceArguments):
    """The data sets that it learns from; cutting and packing are TRL's."""


@dataclass(frozen=True)
class TrlData:
    """What TRL's trainer reads, and the same records as the other recipes measure them.

    Attributes:
        train, held_out: Each a `datasets.Dataset`.
        domains: Of preferences the chosen answers.
        longest: Tokens of a measured example at most.
    """

    train: Any
    held_out: Any
    domains: dict[str, DomainTexts]
    longest: int


class _Read(NamedTuple):
    """A row as it was read: `record` for TRL, None where TRL gets the examples themselves."""

    record: dict[str, Any] | None
    examples: list[Example]


def read_for_sft(
    arguments: TrlDataArguments,
    training: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
    context: int | None = None,
) -> TrlData:
    """Data sets with `input_ids` and `labels`; weights mix the training part.

    `assistant_only_loss` and `completion_only_loss` of the SFTConfig `training` are in the labels; the first is
    switched off there, as TRL would look for conversations.

    Args:
        options: Variables of the chat template.

    Raises:
        DataError: If a data set cannot be used.
        RecipeError: For an option of SFTConfig that would change the tokens afterwards, or `assistant_only_loss`
            without a conversation.
    """
    for name, value in NOT_OURS.items():
        if getattr(training, name) != value:
            instead = "chat_template" if name == "chat_template_path" else "the model's tokenizer and data sets"
            raise RecipeError(f"{name} has no effect here: the recipe tokenises itself. Use {instead}.")
    assistant_only, training.assistant_only_loss = training.assistant_only_loss, False
    encoder = Encoder(
        tokenizer,
        max_length=None,
        assistant_only=assistant_only,
        completion_only=training.completion_only_loss is not False,
        options=options,
    )
    kinds: set[type] = set()
    # what is packed TRL cuts by its packing_strategy
    longest = sys.maxsize if training.packing or training.max_length is None else training.max_length

    def encode(row: Row) -> _Read:
        kinds.add(type(row))
        return _Read(None, encoder.encode(row))

    def remark(where: str, encoding: Encoding) -> None:
        _print_once(training, f"{where}: {encoding}")

    parts = _read(arguments, training, tokenizer, context, FINE_TUNING, encode, remark, longest)
    if assistant_only and not kinds & {Chat, Instruction}:
        raise RecipeError("assistant_only_loss is for conversations, and no data set has any. Leave it out.")
    return parts


def read_for_dpo(
    arguments: TrlDataArguments,
    training: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
    context: int | None = None,
) -> TrlData:
    """Data sets with `chosen`, `rejected`, mostly `prompt`, and for conversations `tools` and `chat_template_kwargs`;
    weights mix the training part.

    Args:
        options: Variables of the chat template; a row's own come first.
        context: Tokens that the model takes at most; what is measured is cut to them.

    Raises:
        DataError: If a data set cannot be used, or two have different columns.
    """

    encoder = Encoder(tokenizer, max_length=None, assistant_only=False, options=options)

    def check(row: Row) -> _Read:
        assert isinstance(row, Preference)
        return _Read(_preference(row, tokenizer, options or {}), _chosen(row, encoder))

    def remark(where: str, encoding: Encoding) -> None:
        for each in encoding.remarks:
            _print_once(training, f"{where}: {each}")

    return _read(
        arguments, training, tokenizer, context, PREFERENCES, check, remark, sys.maxsize, _preference_features
    )


def _print_once(training: TrainingArguments, text: str) -> None:
    if training.process_index == 0:
        print_to_stderr(text)


def _read(
    arguments: TrlDataArguments,
    training: Any,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    layouts: Sequence[Layout],
    work: Callable[[Row], _Read],
    remark: Callable[[str, Encoding], None],
    cut_at: int,
    features: Callable[[list[dict[str, Any]]], Any] = lambda records: None,
) -> TrlData:
    """Read, split and mix every data set.

    Args:
        remark: Called with the encoded training part of each.
        cut_at: Tokens of an example that TRL gets; one that is measured is cut to `max_length` besides.
    """
    from datasets import Dataset, concatenate_datasets, interleave_datasets

    sources = [Source.parse(value) for value in arguments.data]
    total = sum(source.weight for source in sources)
    if not total:
        raise DataError("every data set has the weight 0: there is nothing to train on. Give one a weight.")
    longest = min(training.max_length or _MEASURED, context or sys.maxsize)
    parts: list[list[list[dict[str, Any]]]] = []
    domains: dict[str, DomainTexts] = {}
    for source in sources:
        data_set = read_source(source, layouts, on_bad_row=arguments.on_bad_row)
        done = list(data_set.apply(work).values())
        split = hold_out(done, share=arguments.held_out, most=arguments.held_out_records, where=source.path)
        train, held_out = (cut((row.examples for row in part), cut_at, source.path) for part in split)
        train.remarks += data_set.remarks()
        remark(data_set.where, train)
        parts.append([_records(*each) for each in zip(split, (train, held_out), strict=True)])
        name = source.domain if source.domain not in domains else f"{source.domain} {len(domains) + 1}"
        domains[name] = _measured(source.weight / total, train, held_out, longest, tokenizer)
    schema = features([record for pair in parts for part in pair for record in part])
    made = [[Dataset.from_list(part, features=schema) for part in pair] for pair in parts]
    used = [(source.weight / total, train) for source, (train, _) in zip(sources, made, strict=True) if source.weight]
    mixed = interleave_datasets(
        [train for _, train in used], probabilities=[share for share, _ in used], seed=training.seed,
        stopping_strategy="all_exhausted",
    )  # fmt: skip
    return TrlData(mixed, concatenate_datasets([held_out for _, held_out in made]), domains, longest)


def _records(rows: Sequence[_Read], encoding: Encoding) -> list[dict[str, Any]]:
    """What TRL gets: the records, or the examples that the cut has left."""
    records = [row.record for row in rows if row.record is not None]
    return records or [vars(example) for example in encoding.examples]


def _measured(
    share: float, train: Encoding, held_out: Encoding, longest: int, tokenizer: PreTrainedTokenizerBase
) -> DomainTexts:
    """Held-out examples cut to `longest`, one a row."""
    held_out = cut([held_out.examples], longest, "the held-out records")
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    row_length = max(len(example.input_ids) for example in held_out.examples)
    return DomainTexts(share, train, held_out, pad_examples(held_out.examples, row_length=row_length, padding=padding))


def _chosen(row: Preference, encoder: Encoder) -> list[Example]:
    """The chosen answer after its prompt; the whole conversation if the chat template does not keep them apart."""
    if isinstance(row.chosen, str):
        return encoder.encode(Text(row.chosen) if row.prompt is None else Pair(row.prompt, row.chosen))
    common = next((i for i, pair in enumerate(zip(row.chosen, row.rejected)) if pair[0] != pair[1]), 0)  # noqa: B905
    messages, prompt = [*(row.prompt or []), *row.chosen], len(row.prompt or []) or common
    try:
        return encoder.encode(Chat(messages, prompt or None, row.tools, row.options))
    except RowError:
        return encoder.encode(Chat(messages, None, row.tools, row.options))


def _preference(row: Preference, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> dict[str, Any]:
    """The record that TRL reads, after a check that it can."""
    answers = {"chosen": row.chosen, "rejected": row.rejected}
    record = answers if row.prompt is None else {"prompt": row.prompt, **answers}
    if isinstance(row.chosen, str):
        return record
    if row.prompt is None and row.chosen[0] != row.rejected[0]:
        raise RowError("'chosen' and 'rejected' have no first message in common, and there is no 'prompt'.")
    writer = ChatWriter(tokenizer, options)
    for answer in answers.values():
        writer.text(Chat([*(row.prompt or []), *answer], None, row.tools, row.options))
    return {**record, "tools": row.tools, "chat_template_kwargs": {**options, **row.options}}


def _preference_features(records: list[dict[str, Any]]) -> Any:
    """Conversations and what belongs to them as JSON; plain texts as strings."""
    from datasets import Features, Json, List, Value

    kinds = {(tuple(record), type(record["chosen"])) for record in records}
    if len(kinds) > 1:
        raise DataError(
            "some of the preferences have a 'prompt' and some have none, or some are texts and some conversations. "
            "All data sets of a run need the same columns."
        )
    columns, kind = kinds.pop()
    whole = ("tools", "chat_template_kwargs")
    return Features(
        {name: Json() if name in whole else Value("string") if kind is str else List(Json()) for name in columns}
    )
