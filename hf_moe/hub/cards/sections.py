"""The other parts of a card: loading code, table of facts, sample, limits, citation, versions."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hf_moe.hub.cards.checkpoint_facts import CheckpointFacts
from hf_moe.hub.cards.facts import tables, take
from hf_moe.hub.cards.markdown import NOT_STATED, cell, fenced, plain, table
from hf_moe.hub.cards.metadata import is_repo
from hf_moe.hub.cards.training_facts import TrainingFacts


def facts(checkpoint: CheckpointFacts, training: TrainingFacts, base_model: str | None, license: str | None) -> str:
    """Table of what the model is and is for."""
    same = {None: "", True: " (equal)", False: " (DIFFERENT)"}[training.router_is_same]
    layers = "; ".join(checkpoint.layers) or None
    origin = "trained from scratch" if base_model is None else f"{base_model}, trained from scratch in the same run"
    settings = ", ".join(f"{key} {value}" for key, value in checkpoint.adapter.items())
    adapter = [("adapter", settings)] if settings else []
    of_base = " (base)" if checkpoint.is_adapter and checkpoint.total is not None else ""
    rows = [
        ("architecture", checkpoint.model_class or checkpoint.model_type or training.model_type or NOT_STATED),
        ("base model", origin if training.is_from_scratch else base_model or NOT_STATED),
        ("licence", license or NOT_STATED),
        (f"parameters, total{of_base}", checkpoint.total or training.total),
        (f"parameters, active per token{of_base}", checkpoint.active or training.active),
        ("parameters, trained", training.trained or checkpoint.trained),
        ("MoE layers", layers),
        ("router", ", ".join(f"{key} {value}" for key, value in checkpoint.router.items()) or NOT_STATED),
        ("context, tokens", checkpoint.context),
        ("vocabulary", checkpoint.vocabulary),
        ("dtype", checkpoint.dtype),
        ("router SHA-256 before", training.router_before),
        (f"router SHA-256 after{same}", training.router_after or checkpoint.router_sha256),
        ("bytes of weights", checkpoint.saved_bytes),
        ("logits after loading back", {None: None, True: "equal", False: "DIFFERENT"}[training.loads_back]),
    ]
    return table(["fact", "value"], [("for", _purpose(checkpoint, training)), *rows, *adapter])


def _purpose(checkpoint: CheckpointFacts, training: TrainingFacts) -> str:
    if not checkpoint.is_causal_lm:
        return NOT_STATED
    kinds = training.trained_on
    return "continuing text" + (f" of the kinds it was trained on: {', '.join(kinds)}" if kinds else "")


def loading(checkpoint: CheckpointFacts, training: TrainingFacts, name: str, base_model: str | None) -> str:
    """Code that loads it with hf_moe and without."""
    base = base_model or "the base model"
    if checkpoint.is_adapter:
        code, names = _load_adapter(checkpoint, training, name, base), [name, base]
    else:
        code, names = _load_model(checkpoint, training, name), [name]
    local = [f'"{cell(each)}"' for each in names if not is_repo(each)]
    return f"{code}\n\nPut the path of your copy in the place of {' and '.join(local)}." if local else code


def _load_model(checkpoint: CheckpointFacts, training: TrainingFacts, name: str) -> str:
    ours, auto = (checkpoint.model_type or training.model_type) == "hf_moe", checkpoint.auto_class
    lines = [
        f'model = {auto}.from_pretrained({json.dumps(name)}, experts_implementation="hf_moe")',
        *([f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})"] if checkpoint.has_tokenizer else []),
    ]
    classes = auto + (", AutoTokenizer" if checkpoint.has_tokenizer else "")
    with_ours = ["import hf_moe  # registers", f"from transformers import {classes}", "", *lines]
    options = ", trust_remote_code=True" if ours else ""
    without = [
        f"from transformers import {auto}",
        "",
        f"model = {auto}.from_pretrained({json.dumps(name)}{options})",
    ]
    return _with_and_without(with_ours, without)


def _load_adapter(checkpoint: CheckpointFacts, training: TrainingFacts, name: str, base_model: str) -> str:
    base = json.dumps(base_model)
    ours, auto = (checkpoint.model_type or training.model_type) == "hf_moe", checkpoint.auto_class
    lines = ["from peft import PeftModel", f"from transformers import {auto}", ""]
    with_ours = [
        "import hf_moe  # registers",
        *lines,
        f'model = {auto}.from_pretrained({base}, experts_implementation="hf_moe")',
        f"model = PeftModel.from_pretrained(model, {json.dumps(name)})",
        *(["hf_moe.accelerate_adapters(model)"] if checkpoint.adapter.get("peft_type") == "LORA" else []),
    ]
    if checkpoint.adapter.get("peft_type", "LORA") != "LORA":
        return fenced("\n".join(with_ours), "python") + "\n\nWithout hf_moe this kind of adapter does not load."
    without = [
        *lines,
        f"model = {auto}.from_pretrained({base}{', trust_remote_code=True' if ours else ''})",
        f"model = PeftModel.from_pretrained(model, {json.dumps(name)})",
    ]
    return _with_and_without(with_ours, without)


def _with_and_without(with_ours: Sequence[str], without: Sequence[str]) -> str:
    ours, theirs = (fenced("\n".join(lines), "python") for lines in (with_ours, without))
    return f"{ours}\n\nWithout hf_moe installed:\n\n{theirs}"


def sample(found: TrainingFacts) -> str:
    """Text that it writes, with and without the adapter."""
    titles = {"prompt": "Prompt", "base": "Base model", "adapted": "With the adapter"}
    return "\n\n".join(f"{titles[part]}:\n\n{fenced(text)}" for part, text in found.sample.items() if part in titles)


def limits(results: Mapping[str, Any], training: TrainingFacts, total: int | None) -> str:
    """Sentences on what the facts do not cover."""
    found = []
    if total is not None and total < 100_000_000:
        found.append(f"A small model ({total:,} parameters): it shows the method and knows little.")
    if tables(results, "tasks"):
        found.append("Nothing was evaluated but what the table shows.")
    else:
        found.append("No standard benchmark was run, and nothing that tells of safety or bias.")
    if take(results, "settings.limit", float) is not None:
        found.append("The benchmarks were run on their first documents only: the standard errors are large.")
    if any(domain.change is not None for domain in training.domains):
        found.append("The metrics before and after training are of one run with one seed.")
    found.append("The weights carry the licences of the base model and of the data; clear them before you publish.")
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
    return f"Made on {cell(date or NOT_STATED)} with:\n\n" + table(["library", "version"], list(versions.items()))
