"""Files beside a checkpoint: the report of its run, results of an evaluation, and the card that is there already."""

import logging
import re
from pathlib import Path

from hf_moe.hub.cards.checkpoint_facts import checkpoint_facts
from hf_moe.hub.cards.facts import CardError, read_facts
from hf_moe.hub.cards.markdown import NOT_MEASURED, NOT_STATED
from hf_moe.hub.cards.same_model import refuse_other_results
from hf_moe.hub.upload_files import is_template

logger = logging.getLogger(__name__)
RESULTS_FORMAT = "hf_moe.evaluation/"


def report_beside(model: Path) -> Path | None:
    """`report.json` of the run that made `model`: in its folder, or in the one above.

    Raises:
        CardError: If it is no JSON object.
    """
    for path in _beside(model, "report.json"):
        if "recipe" in read_facts(path):
            return path
        logger.warning("%s is not the report of a training: it is not used.", path)
    return None


def results_beside(model: Path) -> Path | None:
    """`results.json` of `hf-moe evaluate` for `model`: in its folder, or in the one above.

    Raises:
        CardError: If it is no JSON object, or `model` is no checkpoint.
    """
    for path in _beside(model, "results.json"):
        results = read_facts(path)
        if not str(results.get("format")).startswith(RESULTS_FORMAT):
            logger.warning("%s was not written by hf-moe evaluate: it is not used.", path)
            continue
        try:
            refuse_other_results(checkpoint_facts(model), results)
        except CardError as error:
            logger.warning("%s is not used: %s", path, error)
        else:
            return path
    return None


def _beside(model: Path, name: str) -> list[Path]:
    return [path for folder in (model, model.resolve().parent) if (path := folder / name).is_file()]


def keep_richer_card(card: Path, text: str) -> Path | None:
    """Rename the card that is there if it says something that the new one, `text`, does not; returns where it is now.

    That is a section which the new card does not have, or in which it says more often that something is not known.
    """
    if not card.is_file() or is_template(card):
        return None
    old, new = (_sections(each) for each in (card.read_text(encoding="utf-8", errors="replace"), text))
    lost = [name for name, body in old.items() if name not in new or _unknown(new[name]) > _unknown(body)]
    if not lost:
        return None
    names = (card.with_name(f"README.old{number}.md") for number in ("", *range(2, 100)))
    kept = next(path for path in names if not path.exists())
    card.replace(kept)
    logger.warning(
        "the card that was there says more (%s): it is kept as %s. Name what it was made from, such as --training.",
        ", ".join(lost),
        kept,
    )
    return kept


def _sections(card: str) -> dict[str, str]:
    """What stands under each heading."""
    _, *parts = re.split(r"^## ", card, flags=re.MULTILINE)
    return dict(part.partition("\n")[::2] for part in parts)


def _unknown(text: str) -> int:
    return text.count(NOT_MEASURED) + text.count(NOT_STATED)
