"""The page of recipe configuration: every key of every recipe, from the dataclasses that its parser reads."""

import dataclasses
import importlib
import inspect
import re
from contextlib import suppress
from enum import Enum
from typing import Any, get_type_hints
from unittest.mock import patch

RECIPES = {
    "expert-lora": "finetune_expert_lora",
    "adapter-experts": "finetune_adapter_experts",
    "esft": "finetune_esft",
    "full": "finetune_full",
    "sft": "sft_trl",
    "dpo": "dpo_trl",
}
TRAINING_DOCS = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"
_INTRO = f"""# Recipe configuration

Every key below is a key of a recipe's YAML file and an option of its command. An option wins over the file:

```bash
hf-moe finetune expert-lora quickstart/expert_lora.yaml --learning_rate 3e-4
```

An unknown key is an error that names the nearest one. A relative path in a YAML file is looked for in the working
directory, then beside the file. Beyond these keys, every field of
[`TrainingArguments`]({TRAINING_DOCS}) of transformers is a key as well; for `sft` and `dpo` every field of TRL's
`SFTConfig` and `DPOConfig`. Tables show only what hf_moe adds, or gives another default.
"""


class _Parsed(BaseException):
    """Ends a recipe where it would parse its choices."""


def kinds_of(module: Any) -> list[type]:
    """The dataclasses that a recipe gives its parser, which is the first thing that it does."""
    given: list[type] = []

    def take(kinds: Any, *args: Any) -> None:
        given.extend(kinds)
        raise _Parsed

    with patch.object(module, "parse_recipe", take), suppress(_Parsed):
        module.main([])
    return given


def keys_of(kind: type) -> list[tuple[str, str, str, str]]:
    """Name, type, default and help of every key that hf_moe adds to transformers' and TRL's, or changes."""
    stock = next((base for base in kind.__mro__ if base.__module__.startswith(("transformers.", "trl."))), None)
    theirs = {} if stock is None else {field.name: field for field in dataclasses.fields(stock)}
    library = "TRL" if stock is not None and stock.__module__.startswith("trl.") else "transformers"
    hints = get_type_hints(kind)
    return [
        (field.name, type_name(hints[field.name]), _default(field), _help(field, theirs.get(field.name), library))
        for field in dataclasses.fields(kind)
        if field.name not in theirs or _differs(field, theirs[field.name])
    ]


def _differs(field: dataclasses.Field, theirs: dataclasses.Field) -> bool:
    """In its default, or in what we say of it: no default may mean something else to us."""
    own_help = field.metadata.get("help")
    return _default(field) != _default(theirs) or own_help not in (None, theirs.metadata.get("help"))


def type_name(hint: Any) -> str:
    """A type as a reader says it: `pathlib.Path | None` -> `Path`, the values of an enum."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(each.value for each in hint)
    text = hint.__name__ if isinstance(hint, type) and not getattr(hint, "__args__", None) else str(hint)
    names = [name for name in re.sub(r"\b\w+\.", "", text).split(" | ") if name not in ("None", "NoneType")]
    return " or ".join(names)


def _default(field: dataclasses.Field) -> str:
    if field.name == "data":  # an empty list is refused
        return "required"
    if field.default is not dataclasses.MISSING:
        return "" if field.default is None else str(field.default)
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return str(made) if made else ""
    return "required"


def _help(field: dataclasses.Field, theirs: dataclasses.Field | None, library: str) -> str:
    text = field.metadata.get("help") or (theirs.metadata.get("help", "") if theirs else "")
    if theirs is not None and _default(field) != _default(theirs):
        text = f"{text} ({library}: {_default(theirs) or 'none'})".strip()
    return " ".join(text.split())


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, text in rows:
        shown = f"`{default}`" if default and default != "required" else default
        cells = (f"`{name}`", kind, shown, text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


_TITLES = {"ExpertLora": "Expert LoRA", "RecipeTraining": "Training", "TrlData": "Data for TRL"}


def _title(kind: type) -> str:
    """The class's name in words: `EsftArguments` -> `ESFT`."""
    name = kind.__name__.removesuffix("Arguments")
    words = re.sub(r"(?<!^)(?=[A-Z][a-z])", " ", name).capitalize()
    return _TITLES.get(name) or (words.upper() if name in ("Esft", "Sft", "Dpo") else words)


def page() -> str:
    modules = {name: importlib.import_module(f"hf_moe.recipes.{file}") for name, file in RECIPES.items()}
    kinds = {name: kinds_of(module) for name, module in modules.items()}
    users: dict[type, list[str]] = {}
    for name, used in kinds.items():
        for kind in used:
            users.setdefault(kind, []).append(name)
    parts = [_INTRO, "## Recipes\n", "`hf-moe finetune RECIPE` with one of these:\n"]
    parts += ["| recipe | what it does | keys |", "|---|---|---|"]
    for name, module in modules.items():
        first = inspect.getdoc(module).split("\n\n")[0].replace("\n", " ")
        links = ", ".join(f"[{_title(kind)}](#{_anchor(kind)})" for kind in kinds[name])
        parts.append(f"| `{name}` | {first} | {links} |")
    parts.append("\n## Keys\n")
    for kind, names in users.items():
        rows = keys_of(kind)
        parts.append(f"### {_title(kind)} {{ #{_anchor(kind)} }}\n")
        parts.append(f"{_doc(kind)}\n\nUsed by: {', '.join(f'`{name}`' for name in names)}.\n")
        parts.append(_table(rows) + "\n" if rows else "No keys of its own.\n")
    return "\n".join(parts)


def _anchor(kind: type) -> str:
    return kind.__name__.lower()


def _doc(kind: type) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())
