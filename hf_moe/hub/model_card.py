"""Model cards filled from a report's figures. A figure that is not there reads "not measured"; none is made up."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_MEASURED = "not measured"
_NUMBER = re.compile(rf"[-+]?[\d,.]+|{NOT_MEASURED}")
TEMPLATE = "model_card.md.j2"


def render_card(values: Mapping[str, str], metadata: Mapping[str, Any], *, template: str = TEMPLATE) -> str:
    """Fill a template of this folder; the metadata becomes the YAML head, dumped and never formatted.

    Args:
        values: Every name that the template uses, as Markdown. Escape what comes from data: `cell`, `fenced`.
        metadata: Arguments of `huggingface_hub.ModelCardData`.

    Raises:
        ValueError: If a name of the template is missing.
        ImportError: If jinja2 is not installed.
    """
    from huggingface_hub import ModelCardData

    try:
        from jinja2 import Environment, StrictUndefined, UndefinedError
    except ImportError as error:
        raise ImportError('model cards need jinja2. Install it with: pip install "hf-moe[recipes]"') from error
    # Markdown, not HTML: `cell` and `fenced` escape what comes from data; values are not rendered again
    environment = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True)
    source = Path(__file__).with_name(template).read_text(encoding="utf-8")
    try:
        return environment.from_string(source).render(card_data=ModelCardData(**metadata).to_yaml(), **values)
    except UndefinedError as error:
        raise ValueError(f"the model card lacks a value: {error}. Pass every name that {template} uses.") from error


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns of numbers are right-aligned, None reads "not measured"."""
    cells = [[cell(value) for value in row] for row in rows]
    numeric = (all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(header)))
    lines = [[*map(cell, header)], ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    """A value as the text of a table cell: no markup, no line breaks."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int):
        return f"{value:,}"
    text = re.sub(r"([\\`*{}\[\]<>|#])", r"\\\1", " ".join(str(value).split()))
    # inside a word an underscore is no markup
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", text)


def fenced(text: str, language: str = "text") -> str:
    """A code block that the text cannot close."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
