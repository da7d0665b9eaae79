"""The section of a card with texts that the model wrote, before and after training."""

import re

from hf_moe.hub.cards.markdown import cell, fenced
from hf_moe.hub.cards.sections.summary import count
from hf_moe.hub.cards.training_facts import TrainingFacts

_SMALL = 100_000_000  # parameters, below which a language model writes no sense


def samples_section(found: TrainingFacts, total: int | None) -> str:
    """Prompts and what the model wrote after each; nothing where the report holds none."""
    if not found.samples:
        return ""
    parts = [f"Text after prompts from held-out records, written {found.sampling}. Empty lines are left out."]
    if total is not None and total < _SMALL:
        parts.append(
            f"**A model of {count(total)} parameters writes little that makes sense.** Its bits per byte, below, say "
            "more about what training changed."
        )
    for number, sample in enumerate(found.samples, 1):
        of = f" ({cell(sample.domain)})" if sample.domain else ""
        parts += [f"**Prompt {number}**{of}", fenced(_lines(sample.prompt))]
        for label, text in (("Before training", sample.before), ("After training", sample.after)):
            parts += [f"{label}:", fenced(_lines(text))] if text is not None else []
    return "\n\n".join(parts)


def _lines(text: str) -> str:
    """The lines that hold something: small models write many that do not."""
    return re.sub(r"\n\s*\n", "\n", text).strip() or "(nothing but spaces and empty lines)"
