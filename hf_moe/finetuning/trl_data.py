"""Data for TRL's trainers: read, checked and written by the same code as for the other recipes.

TRL 1.16 would write and tokenise conversations itself, from columns that Arrow has given the keys of all rows, and a
row that the chat template refuses ends it in the middle. So SFT gets tokens and labels, which TRL takes as they are,
cuts and packs; DPO, which takes no tokens, gets conversations as JSON, of which Arrow knows no keys.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from hf_moe.data.bad_rows import DataError, RowError
from hf_moe.data.chat_text import ChatWriter
from hf_moe.data.encoding import Encoder, Example, cut
from hf_moe.data.formats import FINE_TUNING, PREFERENCES, Chat, DataSet, Instruction, Layout, Preference, Row
from hf_moe.data.sources import Source, hold_out, read_source
from hf_moe.finetuning.arguments import RecipeError, SourceArguments
from hf_moe.io.console import print_to_stderr

# options of SFTConfig about data that is read and tokenised here, with the values that change nothing
NOT_OURS = {"chat_template_path": None, "dataset_kwargs": None, "dataset_text_field": "text", "eos_token": None}


class TrlDataArguments(SourceArguments):
    """The data sets that it learns from; cutting and packing are TRL's."""


def read_for_sft(
    arguments: TrlDataArguments,
    training: Any,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Training and held-out `datasets.Dataset` with `input_ids` and `labels`; weights mix the training part.

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

    def encode(row: Row) -> list[Example]:
        kinds.add(type(row))
        return encoder.encode(row)

    def prepare(data_set: DataSet, encoded: list, part: str) -> list[dict[str, Any]]:
        encoding = cut(encoded, longest, data_set.where, data_set.remarks())
        if part == "train":
            _print_once(training, f"{data_set.where}: {encoding}")
        return [vars(example) for example in encoding.examples]

    parts = _read(arguments, training, FINE_TUNING, encode, prepare, lambda records: None)
    if assistant_only and not kinds & {Chat, Instruction}:
        raise RecipeError("assistant_only_loss is for conversations, and no data set has any. Leave it out.")
    return parts


def read_for_dpo(
    arguments: TrlDataArguments,
    training: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Training and held-out `datasets.Dataset` with `chosen`, `rejected`, mostly `prompt`, and for conversations
    `tools` and `chat_template_kwargs`; weights mix the training part.

    Args:
        options: Variables of the chat template; a row's own come first.

    Raises:
        DataError: If a data set cannot be used, or two have different columns.
    """

    def check(row: Row) -> dict[str, Any]:
        assert isinstance(row, Preference)
        return _preference(row, tokenizer, options or {})

    def prepare(data_set: DataSet, records: list, part: str) -> list[dict[str, Any]]:
        if part == "train":
            for remark in data_set.remarks():
                _print_once(training, f"{data_set.where}: {remark}")
        return records

    return _read(arguments, training, PREFERENCES, check, prepare, _preference_features)


def _print_once(training: TrainingArguments, text: str) -> None:
    if training.process_index == 0:
        print_to_stderr(text)


def _read(
    arguments: TrlDataArguments,
    training: TrainingArguments,
    layouts: Sequence[Layout],
    work: Callable[[Row], Any],
    prepare: Callable[[DataSet, list, str], list[dict[str, Any]]],
    features: Callable[[list[dict[str, Any]]], Any],
) -> tuple[Any, Any]:
    from datasets import Dataset, concatenate_datasets, interleave_datasets

    sources = [Source.parse(value) for value in arguments.data]
    total = sum(source.weight for source in sources)
    if not total:
        raise DataError("every data set has the weight 0: there is nothing to train on. Give one a weight.")
    parts = []
    for source in sources:
        data_set = read_source(source, layouts, on_bad_row=arguments.on_bad_row)
        done = list(data_set.apply(work).values())
        train, held_out = hold_out(done, share=arguments.held_out, most=arguments.held_out_records, where=source.path)
        parts.append((prepare(data_set, train, "train"), prepare(data_set, held_out, "held out")))
    schema = features([record for pair in parts for part in pair for record in part])
    made = [[Dataset.from_list(part, features=schema) for part in pair] for pair in parts]
    used = [(source.weight / total, train) for source, (train, _) in zip(sources, made, strict=True) if source.weight]
    mixed = interleave_datasets(
        [train for _, train in used], probabilities=[share for share, _ in used], seed=training.seed,
        stopping_strategy="all_exhausted",
    )  # fmt: skip
    return mixed, concatenate_datasets([held_out for _, held_out in made])


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
