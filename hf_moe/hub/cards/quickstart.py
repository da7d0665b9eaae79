"""The card of the quickstart, from its `report.json` and its adapter."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_moe.hub.cards.card import card_from_facts
from hf_moe.hub.cards.checkpoint_facts import CheckpointFacts, checkpoint_facts
from hf_moe.hub.cards.metadata import CardChoices
from hf_moe.hub.cards.training_facts import training_facts

PLOTS = ("plots/bits_per_byte.png", "plots/expert_load.png", "plots/loss.png")


def quickstart_card(report: Mapping[str, Any], folder: Path | None = None) -> str:
    """The card as Markdown with a YAML head: a base model in `model`, and an adapter on it in `adapter`.

    Args:
        folder: Where both lie; None: what the report does not say is not known.

    Raises:
        CardError: If the adapter is not there, or damaged.
        ImportError: If jinja2 is not installed.
    """
    facts = training_facts(report)
    unseen = CheckpointFacts("adapter", is_adapter=True, model_type=facts.model_type, adapter={"peft_type": "LORA"})
    checkpoint = unseen if folder is None else replace(checkpoint_facts(folder / "adapter"), name="adapter")
    title = f"hf_moe quickstart: a small Mixture-of-Experts, adapted to {facts.new_domain}"
    # its own text is English, a user's file may be anything
    language = None if facts.settings.get("data") else "en"
    choices = CardChoices(base_model="model", language=language)
    return str(card_from_facts(checkpoint, facts, choices=choices, title=title, plots=PLOTS))
