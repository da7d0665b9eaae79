"""Values as Markdown. What comes from data cannot become markup; what is not there reads "not measured"."""

import math
import re
from collections.abc import Sequence
from typing import Any

NOT_MEASURED = "not measured"
NOT_STATED = "not stated"
_NUMBER = re.compile(rf"-|[-+]?[\d,.]+%?( ± [\d.]+| \([-+\d. to]+\))?|{NOT_MEASURED}")
_LONGEST = 500  # characters of a text from data


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns of numbers are right-aligned, None reads "not measured"."""
    cells = [[cell(value) for value in row] for row in rows]
    numeric = (all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(header)))
    lines = [[*map(cell, header)], ["---:" if right else "---" for right in numeric], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def image(plots: Sequence[str], path: str, title: str) -> str:
    """The image at `path` if it is one of `plots`, or else nothing."""
    return f"![{title}]({path})" if path in plots else ""


def details(summary: str, body: str) -> str:
    """A part that opens on a click, of Markdown that is ours or escaped."""
    return f"<details>\n<summary>{summary}</summary>\n\n{body}\n\n</details>"


def cell(value: Any) -> str:
    """A value as the text of a table cell: no markup, no line breaks, nothing invisible."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NOT_MEASURED
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = re.sub(r"([\\`*{}\[\]<>|#~&])", r"\\\1", plain(value))
    # inside a word an underscore is no markup
    return re.sub(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", r"\_", text)


def plain(value: Any) -> str:
    """One line of visible text, cut where it gets long."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def fenced(text: str, language: str = "text") -> str:
    """A code block that the text cannot close."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
