"""Text of unknown origin made safe to show, and numbers made easy to read.

Markup is not handled here: the template escapes, the script sets `textContent`. This is about what an escape leaves
as it is: controls, marks that turn the reading direction around, lone surrogates, tokens without end.
"""

import math
import re
import unicodedata
from collections.abc import Sequence

LONGEST_TOKEN, LONGEST_NAME = 48, 120
_SHOWN_AS = {"\n": "↵", "\t": "⇥", "\r": "⟨CR⟩"}
_SPACES = ("Zs",)


def visible(text: str, limit: int = LONGEST_NAME) -> str:
    """`text` with every control, format and unassigned character shown by its number or a sign, cut to `limit`.

    Format characters are among them: marks of direction (U+202E), of no width (U+200B). Letters of any script and
    spaces stay.
    """
    cut = f"{text[:limit]}… ({len(text):,} characters)" if len(text) > limit else text
    return cut if cut.isprintable() else "".join(map(_visible_character, cut))


def visible_token(text: str) -> str:
    """As `visible`; a line's end also ends the line."""
    return visible(text, LONGEST_TOKEN).replace("↵", "↵\n") if "\n" in text else visible(text, LONGEST_TOKEN)


def _visible_character(character: str) -> str:
    if character.isprintable() or unicodedata.category(character) in _SPACES:
        return character
    return _SHOWN_AS.get(character, f"⟨U+{ord(character):04X}⟩")


def short_labels(names: Sequence[str]) -> list[str]:
    """Shorten names to what differs: "model.layers.3.mlp" among its like is "layer 3"; visible, no two alike."""
    if not names:
        return []
    before, after = _shared_ends(names)
    middles = [name[len(before) : len(name) - len(after)] for name in names]
    if all(re.fullmatch(r"\d{1,6}", middle) for middle in middles):
        return [f"layer {middle}" for middle in middles]
    single = re.search(r"\.(\d{1,6})\.", names[0])
    if len(names) == 1 and single:
        return [f"layer {single[1]}"]
    return [visible(label, 60) for label in (middles if all(middles) else names)]


def _shared_ends(names: Sequence[str]) -> tuple[str, str]:
    """The start and the end that all names share, at whole parts of the path."""
    if len(names) == 1:
        return "", ""
    before = _shared_start(names).rpartition(".")
    after = _shared_start([name[::-1] for name in names]).rpartition(".")
    return before[0] + before[1], (after[0] + after[1])[::-1]


def _shared_start(names: Sequence[str]) -> str:
    first, last = min(names), max(names)
    return next((first[:i] for i, letter in enumerate(first) if not last.startswith(letter, i)), first)


def count(value: float) -> str:
    """1234567 -> "1,234,567"."""
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """1234567 -> "1.23M"."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return count(value)


def percent(share: float) -> str:
    """0.0421 -> "4.2%"; NaN is a dash."""
    if math.isnan(share):
        return "–"
    return "<0.1%" if 0 < share < 0.001 else f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def times(ratio: float) -> str:
    """2.134 -> "2.1" with a multiplication sign; NaN is a dash."""
    if math.isnan(ratio):
        return "–"
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×" if ratio >= 1 else f"{ratio:.2f}×"


def decimal(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def plural(number: float, word: str) -> str:
    """(2, "layer") -> "2 layers"."""
    return f"{count(number)} {word}{'' if number == 1 else 's'}"
