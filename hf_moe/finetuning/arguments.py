"""A recipe's choices: a YAML file, each of whose keys is also an option of the command line, which wins."""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser, TrainingArguments

from hf_moe.data.formats import check_options
from hf_moe.training.checkpointing.checkpoints import TOKEN_IS_PICKLED

RENAMED = {"datasets": "data"}
SMOKE_HELP = "Four short steps, to see that everything works."


class RecipeError(ValueError):
    """A choice that cannot be used: names it, the rule, and the way out. Nothing has been done yet."""


@dataclass
class ModelArguments:
    """The model that is fine-tuned."""

    model: str = field(metadata={"help": "A model folder, or a name on the Hub."})
    experts_implementation: str = field(default="hf_moe", metadata={"help": "How experts run; see `hf-moe info`."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto (as saved), float32, bfloat16."})
    chat_template: str | None = field(
        default=None, metadata={"help": "A Jinja file for conversations, if the tokenizer's will not do."}
    )
    # in the order of transformers, whose parser reads unions by position
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Variables of the chat template, as JSON: '{\"enable_thinking\": false}'."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except ValueError as error:
                raise RecipeError(f"chat_template_kwargs is not valid JSON ({error}).") from error
        check_options(self.chat_options)

    @property
    def chat_options(self) -> dict[str, Any]:
        """`chat_template_kwargs`, read."""
        return self.chat_template_kwargs or {}  # type: ignore[return-value]


@dataclass
class SourceArguments:
    """The data sets that it learns from. In YAML each may also be a mapping: path, domain, weight, config, split."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Files (.jsonl .json .csv, also .gz; .parquet .txt .md), folders, or Hub names."},
    )
    held_out: float = field(default=0.05, metadata={"help": "Share of each data set kept for evaluation."})
    held_out_records: int = field(default=64, metadata={"help": "At most this many records of each."})
    on_bad_row: str = field(
        default="error", metadata={"help": "Of rows that cannot be used: error, or skip to leave them out."}
    )

    def __post_init__(self) -> None:
        if not self.data:
            raise RecipeError("no data: give at least one data set (data, --data).")
        if not 0 < self.held_out < 1:
            raise RecipeError(f"held_out must be a share between 0 and 1, got {self.held_out}.")
        if self.held_out_records < 1:
            raise RecipeError(f"held_out_records must be at least 1, got {self.held_out_records}.")


@dataclass
class DataArguments(SourceArguments):
    """The data sets that it learns from, and how they are put into rows."""

    row_length: int = field(default=1024, metadata={"help": "Tokens of a training row."})
    packing: bool = field(default=True, metadata={"help": "Several examples a row, kept apart by position ids."})
    assistant_only: bool = field(default=True, metadata={"help": "Learn only the assistant's turns of conversations."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.row_length < 8:
            raise RecipeError(f"row_length must be at least 8 tokens, got {self.row_length}.")


@dataclass
class ExpertLoraArguments:
    """The adapter."""

    r: int = field(default=16, metadata={"help": "Rank for each expert."})
    lora_alpha: int | None = field(default=None, metadata={"help": "Twice the rank if not given."})
    attention: bool = field(default=False, metadata={"help": "Adapt the attention projections as well."})
    shared_experts: bool = field(default=False, metadata={"help": "Adapt the shared experts as well."})

    def __post_init__(self) -> None:
        if self.r < 1:
            raise RecipeError(f"r, the rank, must be at least 1, got {self.r}.")


@dataclass
class RecipeTrainingArguments(TrainingArguments):
    """TrainingArguments of transformers with the defaults of the recipes, and `smoke`."""

    output_dir: str | None = field(default="finetune-output")
    learning_rate: float = field(default=1e-3)
    lr_scheduler_type: str = field(default="cosine")
    logging_steps: float = field(default=10)
    logging_nan_inf_filter: bool = field(default=False)  # a NaN loss must not be logged as 0
    save_steps: float = field(default=100)
    save_total_limit: int | None = field(default=2)
    # in the order of transformers, whose parser reads unions by position
    report_to: None | str | list[str] = field(default="none")  # noqa: RUF036
    remove_unused_columns: bool | None = field(default=False)
    train_sampling_strategy: str = field(default="sequential")  # the mixture has put the rows in order
    smoke: bool = field(default=False, metadata={"help": SMOKE_HELP})

    def __post_init__(self) -> None:
        if self.hub_token is not None:
            raise RecipeError(TOKEN_IS_PICKLED)
        if self.smoke:
            shorten(self)
        super().__post_init__()


def shorten(arguments: Any) -> None:
    """Set a Trainer's arguments to four short steps."""
    arguments.max_steps, arguments.logging_steps, arguments.save_steps = 4, 1, 2
    arguments.per_device_train_batch_size = min(arguments.per_device_train_batch_size, 2)


RECIPE = (ModelArguments, DataArguments, RecipeTrainingArguments)


def parse_recipe(
    kinds: Sequence[type], arguments: Sequence[str] | None = None, recipe: str | None = None
) -> list[Any]:
    """One instance of each dataclass, from `--config FILE` and options of the command line.

    Args:
        recipe: The recipe's file. Of the configs beside it `--config` needs no more than the name, wherever they are
            installed; a file of that name in the working directory comes first.

    Raises:
        RecipeError: For a file that cannot be read, an unknown or repeated key, or a value of the wrong type.
        SystemExit: For a wrong command line, as argparse does.
    """
    parser = HfArgumentParser(list(kinds), allow_abbrev=False)
    parser.add_argument("--config", type=Path, help="A YAML file; options of the command line win over it.")
    given_options = sys.argv[1:] if arguments is None else arguments
    refuse_old_names(each[2:].partition("=")[0] for each in given_options if each.startswith("--"))
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    config = first.parse_known_args(arguments)[0].config
    if config is not None:
        if recipe is not None and not config.is_absolute() and not config.exists():
            shipped = Path(recipe).with_name("configs") / config
            config = shipped if shipped.exists() else config
        given = beside_config(read_yaml(config), config)
        _set_defaults(parser, given, config)
        _refuse_wrong_types(kinds, given, config)
    try:
        return list(parser.parse_args_into_dataclasses(arguments))[: len(kinds)]
    except (TypeError, ValueError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(str(error)) from error


def refuse_old_names(names: Iterable[str]) -> None:
    """Raises RecipeError for a choice that has another name now."""
    for name in names:
        if name in RENAMED:
            raise RecipeError(f"{name} is called {RENAMED[name]} now.")


def beside_config(given: dict[str, Any], config: Path) -> dict[str, Any]:
    """What a config says, its data and chat template found: in the working directory, or else beside the config.

    A path that is in neither place stays as it is: data may be names on the Hub.
    """

    def find(value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            return {**value, "path": find(value["path"])}
        if not isinstance(value, str) or Path(value).exists():
            return value
        beside = config.parent / value
        return str(beside.resolve()) if beside.exists() else value

    found = dict(given)
    if isinstance(given.get("data"), list):
        found["data"] = [find(value) for value in given["data"]]
    if "chat_template" in given:
        found["chat_template"] = find(given["chat_template"])
    return found


def _set_defaults(parser: HfArgumentParser, given: dict[str, Any], config: Path) -> None:
    refuse_old_names(given)
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    for key, value in given.items():
        if key not in actions:
            near = get_close_matches(str(key), actions, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else " --help lists the keys."
            raise RecipeError(f"{config}: unknown key {key!r}.{hint}")
        if key != "data" and isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # argparse gives strings their type: YAML reads 1e-4 as a string too
        parser.set_defaults(**{key: value})
        actions[key].required = False


def _refuse_wrong_types(kinds: Sequence[type], given: Mapping[str, Any], config: Path) -> None:
    """argparse reads text alone, and takes whatever else YAML made of a value as it is."""
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    for key, value in given.items():
        kind = hints[key]
        wanted = {get_origin(each) or each for each in (get_args(kind) if _is_union(kind) else [kind])}
        if not _fits(value, wanted):
            names = ", ".join(sorted("null" if each is NoneType else each.__name__ for each in wanted))
            quote = isinstance(value, bool) and str in wanted
            hint = " YAML reads yes, no, on and off so: put it in quotes." if quote else ""
            finite = "finite " if isinstance(value, float) else ""
            raise RecipeError(f"{config}: {key} must be {finite}{names}, got {value!r:.80}.{hint}")


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _fits(value: Any, wanted: set[Any]) -> bool:
    if value is None or isinstance(value, bool | list | dict):
        return type(value) in wanted
    if isinstance(value, float):
        return math.isfinite(value) and bool(wanted & {float, str})
    if isinstance(value, int):
        return bool(wanted & {int, float, str}) and abs(value) < 2**63
    return wanted - {NoneType} != {list}  # text is read by argparse, which makes no list of it


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would take the last in silence, aliases, which can explode, and
    12:30 for a number: YAML would read 750."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} comes twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        if ":" in node.value:
            raise yaml.constructor.ConstructorError(
                None, None, f"{node.value} is read as minutes and seconds: put text in quotes", node.start_mark
            )
        is_float = node.tag.endswith("float")
        return self.construct_yaml_float(node) if is_float else self.construct_yaml_int(node)


for _tag in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _StrictLoader.construct_number)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        RecipeError: If the file is missing, no YAML, no mapping, has a key twice or an alias.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _StrictLoader)
    except OSError as error:
        raise RecipeError(f"the config {str(path)!r} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise RecipeError(f"the config {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(value, dict):
        raise RecipeError(f"the config {str(path)!r} must be a mapping of keys to values, got {type(value).__name__}.")
    return value
