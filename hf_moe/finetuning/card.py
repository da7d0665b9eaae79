"""The results folder of a fine-tuning recipe: report, plots, and the model card written from the report."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_moe.hub.cards.card import card_from_facts
from hf_moe.hub.cards.checkpoint_facts import checkpoint_facts
from hf_moe.hub.cards.emissions_facts import emissions_facts
from hf_moe.hub.cards.metadata import CardChoices
from hf_moe.hub.cards.plots import draw_plots
from hf_moe.hub.cards.training_facts import training_facts
from hf_moe.io.whole_files import whole_folder, write_json, write_text

Report = Mapping[str, Any]
PLOTS = ("plots/bits_per_byte.png", "plots/loss.png")


def write_results(folder: Path, report: Report, *, saved: str) -> None:
    """Write `report.json`, `plots/` and `README.md`; each file is whole or not there.

    Args:
        saved: What lies beside them: `adapter` or `model`.

    Raises:
        CardError: If what was saved is not there or damaged, or codecarbon's `emissions.csv` is.
        ImportError: If jinja2 or matplotlib is not installed.
    """
    with whole_folder(folder / "plots") as plots:
        for path in draw_plots(plots, report, None):
            path.replace(plots / path.name)
        (plots / "plots").rmdir()
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", finetune_card(folder, report, saved=saved))


def finetune_card(folder: Path, report: Report, *, saved: str) -> str:
    """The card as Markdown with a YAML head, from the report and what lies in the folder."""
    facts = replace(training_facts(report), emissions=emissions_facts(folder))
    choices = CardChoices(base_model=facts.base_model)
    return str(card_from_facts(checkpoint_facts(folder / saved), facts, choices=choices, plots=PLOTS))
