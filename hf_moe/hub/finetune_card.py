"""The results folder of a fine-tuning recipe: report, plots, and the model card written from the report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_moe.hub.card import card_from_facts
from hf_moe.hub.card_plots import draw_plots
from hf_moe.hub.checkpoint_facts import CheckpointFacts
from hf_moe.hub.training_facts import training_facts
from hf_moe.training.checkpoints import whole_folder, write_json, write_text

Report = Mapping[str, Any]
PLOTS = ("plots/bits_per_byte.png", "plots/loss.png")


def write_results(folder: Path, report: Report, *, saved: str, needs_hf_moe: bool = False) -> None:
    """Write `report.json`, `plots/` and `README.md`; each file is whole or not there.

    Args:
        saved: What lies beside them: `adapter` or `model`.
        needs_hf_moe: Whether an adapter is of a kind that loads with hf_moe alone.

    Raises:
        ImportError: If jinja2 or matplotlib is not installed.
    """
    with whole_folder(folder / "plots") as plots:
        for path in draw_plots(plots, report, None):
            path.replace(plots / path.name)
        (plots / "plots").rmdir()
    write_json(folder / "report.json", report)
    write_text(folder / "README.md", finetune_card(report, saved=saved, needs_hf_moe=needs_hf_moe))


def finetune_card(report: Report, *, saved: str, needs_hf_moe: bool = False) -> str:
    """The card as Markdown with a YAML head, from the report alone."""
    facts = training_facts(report)
    checkpoint = CheckpointFacts(
        name=saved,
        is_adapter=saved == "adapter",
        model_type=facts.model_type,
        adapter={"peft_type": "ADAPTER_EXPERTS" if needs_hf_moe else "LORA"} if saved == "adapter" else {},
        saved_bytes=report.get("saved_bytes"),
        has_tokenizer=saved == "model",
    )
    title = f"{facts.recipe} on {facts.base_model}"
    return str(card_from_facts(checkpoint, facts, title=title, base_model=facts.base_model, plots=PLOTS))
