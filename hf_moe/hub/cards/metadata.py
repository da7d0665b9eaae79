"""Metadata at the head of a card: what its author chose, and results that were measured on data with a name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_moe.hub.cards.benchmarks import HARNESS_URL, revision, source
from hf_moe.hub.cards.checkpoint_facts import CheckpointFacts
from hf_moe.hub.cards.emissions_facts import Emissions
from hf_moe.hub.cards.facts import CardError, tables, take
from hf_moe.hub.cards.markdown import plain

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual", re.ASCII)


def is_repo(name: str | None) -> bool:
    """True if it reads as owner/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None and "/" in name


@dataclass(frozen=True)
class CardChoices:
    """Choices of the author, which no fact tells: the arguments of `model_card` by the same names."""

    repo_id: str | None = None
    base_model: str | None = None
    license: str | None = None
    language: str | None = None
    datasets: Sequence[str] = ()

    def checked(self) -> "CardChoices":
        """Return the choices if the Hub takes them all.

        Raises:
            CardError: If the Hub would not take one of the values.
        """
        named = ("repo_id", self.repo_id), ("base_model", self.base_model)
        for what, name in (*named, *(("dataset", each) for each in self.datasets)):
            if name is not None and not is_repo(name):
                raise CardError(f"{what} must be a name on the Hub, owner/name, got {name!r}.")
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise CardError(
                f"license must be an identifier of the Hub such as apache-2.0, or other, got {self.license!r}. They "
                "are listed at https://huggingface.co/docs/hub/repositories-licenses."
            )
        if self.language is not None and not _LANGUAGE.fullmatch(self.language):
            raise CardError(
                f"language must be an ISO 639 code such as en, code or multilingual, got {self.language!r}."
            )
        return self


def card_data(
    checkpoint: CheckpointFacts,
    results: Mapping[str, Any],
    choices: CardChoices,
    *,
    emissions: Emissions | None = None,
    training_type: str | None = None,
) -> ModelCardData:
    """Metadata that the Hub accepts; a base or data set without a name there is left out.

    Args:
        choices: With `repo_id` and `base_model` filled in from the facts; they need not be names on the Hub.
        training_type: `pre-training` or `fine-tuning`, for the emissions.
    """
    evaluations = eval_results(results)
    base_model = choices.base_model if is_repo(choices.base_model) else None
    is_lora = checkpoint.adapter.get("peft_type") == "LORA"
    return ModelCardData(
        language=choices.language,
        license=choices.license,
        library_name="peft" if checkpoint.is_adapter else "transformers",
        pipeline_tag="text-generation" if checkpoint.is_causal_lm else None,
        base_model=base_model,
        base_model_relation=None if base_model is None else "adapter" if checkpoint.is_adapter else "finetune",
        datasets=[each for each in choices.datasets if is_repo(each)] or None,
        tags=["moe", "mixture-of-experts", "hf-moe", *(["lora"] if is_lora else [])],
        model_name=plain(choices.repo_id) if evaluations else None,
        eval_results=evaluations or None,
        co2_eq_emissions=co2_eq_emissions(emissions, training_type),
    )


def co2_eq_emissions(found: Emissions | None, training_type: str | None) -> dict[str, Any] | None:
    """Emissions as the Hub documents them, in grams of CO2 equivalents; None where they are of an assumed place."""
    if found is None or not found.is_location_known:
        return None
    fields = {
        "emissions": float(f"{1000 * found.emissions:.4g}"),
        "source": "codecarbon",
        "training_type": training_type,
        "geographical_location": found.location,
        "hardware_used": found.hardware,
    }
    return {name: value for name, value in fields.items() if value is not None}


def eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """One entry for each metric of each task whose data set has a name on the Hub: for `model-index`."""
    entries = []
    for task_name, task in tables(results, "tasks").items():
        dataset = take(task, "data.dataset", str)
        for metric, found in tables(task, "metrics").items():
            value = take(found, "value", float)
            if value is not None and is_repo(dataset):
                entries.append(_eval_result(results, task_name, task, str(dataset), metric, value))
    return entries


def _eval_result(
    results: Mapping[str, Any], name: str, task: Mapping[str, Any], dataset: str, metric: str, value: float
) -> EvalResult:
    metric_name, _, filter_name = metric.partition(",")
    count, available = take(task, "num_samples", int), take(task, "num_available", int)
    shots = take(task, "num_fewshot", int)
    part = f"n={count}" if count == available else f"first {count} of {available}"
    how = ", ".join([*([filter_name] if filter_name != "none" else []), f"{shots}-shot", part])
    return EvalResult(
        task_type="text-generation",
        dataset_type=dataset,
        dataset_name=plain(name),
        dataset_config=take(task, "data.config", str),
        dataset_split=take(task, "data.split", str),
        dataset_revision=revision(task),
        metric_type=plain(metric_name),
        metric_name=plain(f"{metric_name} ({how})"),
        metric_value=value,
        source_name=source(results),
        source_url=HARNESS_URL,
    )
