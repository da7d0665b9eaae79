"""The table of facts of a card, its limits, how to cite it, and versions."""

import re
from collections.abc import Mapping
from typing import Any

from hf_moe.hub.cards.checkpoint_facts import CheckpointFacts
from hf_moe.hub.cards.facts import tables, take
from hf_moe.hub.cards.markdown import NOT_STATED, cell, details, fenced, plain, table
from hf_moe.hub.cards.metadata import is_repo
from hf_moe.hub.cards.sections.summary import count, listed
from hf_moe.hub.cards.training_facts import TrainingFacts

_DIGITS = 12
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_LOADED = {True: "equal", False: "DIFFERENT"}


def facts(checkpoint: CheckpointFacts, training: TrainingFacts, base_model: str | None, license: str | None) -> str:
    """Table of what the model is and is for; the whole hashes of its routers below it."""
    local = "" if base_model is None or is_repo(base_model) else " (a folder, not on the Hub)"
    origin = "trained from scratch" if base_model is None else f"{base_model}, trained from scratch in the same run"
    of_base = " of the base" if checkpoint.is_adapter and checkpoint.total is not None else ""
    settings = [f"{key} {value}" for key, value in checkpoint.adapter.items() if key in ("r", "lora_alpha")]
    adapter = ", ".join([checkpoint.adapter_kind or NOT_STATED, *settings])
    after = training.router_after or checkpoint.router_sha256
    rows = [
        ("meant for", _purpose(checkpoint, training)),
        ("architecture", checkpoint.model_class or checkpoint.model_type or training.model_type or NOT_STATED),
        ("base model", origin if training.is_from_scratch else f"{base_model}{local}" if base_model else NOT_STATED),
        *([("adapter", adapter)] if checkpoint.is_adapter else []),
        ("licence", license or NOT_STATED),
        (f"parameters{of_base}", checkpoint.total or training.total),
        (f"parameters{of_base} that are active for a token", checkpoint.active or training.active),
        ("parameters trained", training.trained or checkpoint.trained),
        ("MoE layers", "; ".join(checkpoint.layers) or None),
        ("router", ", ".join(f"{key} {value}" for key, value in checkpoint.router.items()) or NOT_STATED),
        ("SHA-256 of the routers", _router(training, after)),
        ("context, tokens", checkpoint.context),
        ("vocabulary", checkpoint.vocabulary),
        ("dtype", checkpoint.dtype),
        ("bytes of weights", checkpoint.saved_bytes),
        *([("logits after loading back", _LOADED[training.loads_back])] if training.loads_back is not None else []),
    ]
    hashes = {"before": training.router_before, "after": after}
    whole = [f"{when}: `{plain(each)}`" for when, each in hashes.items() if each is not None and _HASH.fullmatch(each)]
    shown = details("The whole SHA-256 of the routers' weights", "\n\n".join(whole)) if whole else ""
    return "\n\n".join(part for part in (table(["fact", "value"], rows), shown) if part)


def _router(training: TrainingFacts, after: str | None) -> str | None:
    """The first digits, before and after training."""
    if training.router_is_same is None:
        return None if after is None else after[:_DIGITS]
    before = str(training.router_before)[:_DIGITS]
    return (
        f"{before}, the same before and after"
        if training.router_is_same
        else f"{before} before, {str(after)[:_DIGITS]} after: CHANGED"
    )


def _purpose(checkpoint: CheckpointFacts, training: TrainingFacts) -> str:
    if not checkpoint.is_causal_lm:
        return NOT_STATED
    learned = training.trained_on if training.is_from_scratch and not checkpoint.is_adapter else training.tuned_on
    others = [name for name in training.trained_on if name not in learned]
    text = "writing text" + (f" like {listed(learned)}" if learned else "")
    return text + (f" (mixed in: {listed(others)})" if others else "")


def limits(results: Mapping[str, Any], training: TrainingFacts, total: int | None) -> str:
    """Sentences on what the facts do not cover."""
    found = []
    if total is not None and total < 100_000_000:
        found.append(f"This is a small model ({count(total)} parameters): it shows the method and knows little.")
    if tables(results, "tasks"):
        found.append("Only what the tables show was evaluated; nothing here tells of safety or bias.")
    else:
        found.append("No standard benchmark was run. Nothing here tells of safety or bias.")
    if take(results, "settings.limit", float) is not None:
        found.append("The benchmarks ran on their first documents only, so the standard errors are large.")
    if any(domain.change is not None for domain in training.domains):
        found.append("The metrics before and after training come from one run with one seed.")
    found.append("The licences of the base model and of the data apply: check them before you publish the weights.")
    return " ".join(found)


def citation(title: str, name: str, date: str | None) -> str:
    """BibTeX without made-up authors; the address where it has one."""
    place = {"url": f"https://huggingface.co/{name}"} if is_repo(name) else {}
    year = {"year": date[:4]} if date is not None and re.match(r"[12]\d{3}-", date) else {}
    fields = {"title": _tex(title), **place, **year, "note": "made with hf-moe"}
    lines = [f"  {field} = {{{value}}}," for field, value in fields.items()]
    key = re.sub(r"[^A-Za-z0-9]+", "_", name if is_repo(name) else f"hf_moe {name}").strip("_")
    return fenced("\n".join([f"@misc{{{key},", *lines, "}"]), "bibtex")


def _tex(text: str) -> str:
    return "".join(letter for letter in plain(text) if letter not in "{}\\")


def made_with(training: TrainingFacts, results: Mapping[str, Any]) -> str:
    """Versions of the libraries, and the day."""
    versions = {**(take(results, "versions", dict) or {}), **training.versions}
    date = training.date or take(results, "date", str)
    if not versions:
        return f"Versions: {NOT_STATED}."
    listed_versions = ", ".join(f"{cell(name)} {cell(version)}" for name, version in versions.items())
    return f"Made on {cell(date or NOT_STATED)} with {listed_versions}."
