"""The card of the quickstart, from its `report.json`."""

from collections.abc import Mapping
from typing import Any

from hf_moe.hub.card import card_from_facts
from hf_moe.hub.checkpoint_facts import CheckpointFacts
from hf_moe.hub.training_facts import training_facts

PLOTS = ("plots/bits_per_byte.png", "plots/expert_load.png", "plots/loss.png")


def run_card(report: Mapping[str, Any]) -> str:
    """The card as Markdown with a YAML head: a base model in `model`, and an adapter on it in `adapter`.

    Raises:
        ImportError: If jinja2 is not installed.
    """
    facts = training_facts(report)
    choices = report.get("choices", {})
    checkpoint = CheckpointFacts(
        name="adapter",
        is_adapter=True,
        model_type="hf_moe",
        adapter={"peft_type": "LORA", "r": choices.get("adapter_rank")},
        layers=(
            f"{choices.get('experts')} experts, top-{choices.get('experts_per_token')}, one shared, width "
            f"{choices.get('expert_width')}, in each of {choices.get('layers')} layers",
        ),
        context=choices.get("row_length"),
        vocabulary=choices.get("vocab_size"),
    )
    title = f"hf_moe quickstart: a small Mixture-of-Experts, adapted to {facts.new_domain}"
    return str(card_from_facts(checkpoint, facts, title=title, base_model="model", language="en", plots=PLOTS))
