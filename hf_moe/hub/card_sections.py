"""The parts of a card, each from facts alone."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hf_moe.hub.checkpoint_facts import CheckpointFacts
from hf_moe.hub.facts import tables, take
from hf_moe.hub.markdown import NOT_MEASURED, cell, fenced, plain, table
from hf_moe.hub.routing_facts import FIGURES, RoutingFacts
from hf_moe.hub.training_facts import Domain, TrainingFacts

NOT_STATED = "not stated"
_BITS_NOTE = (
    "Bits per byte: the negative log2-likelihood of held-out text, divided by its UTF-8 bytes; lower is better. One "
    "run, one seed: no error bars."
)
_AGREEMENT_NOTE = (
    "Agreement: the share of held-out tokens whose set of experts is the same before and after training. A frozen "
    "router is no frozen routing: what earlier layers learn moves its inputs."
)
_FIGURES = {
    "load_entropy": "load entropy (1 = balanced)",
    "max_violation": "busiest expert above the mean (0 = balanced)",
    "load_cv": "variation of the load (0 = balanced)",
    "router_entropy": "router entropy (0 = certain)",
    "margin": "margin between the two best experts",
    "dead_experts": "experts that no token chose",
    "drop_share": "share of assignments dropped",
}


def facts(checkpoint: CheckpointFacts, training: TrainingFacts, base_model: str | None, license: str | None) -> str:
    """What it is, in numbers."""
    same = {None: "", True: " (equal)", False: " (DIFFERENT)"}[training.router_is_same]
    layers = "; ".join(checkpoint.layers) or None
    adapter = ", ".join(f"{key} {value}" for key, value in checkpoint.adapter.items())
    rows = [
        ("architecture", checkpoint.model_class or checkpoint.model_type or training.model_type or NOT_STATED),
        ("base model", base_model or ("none: trained from scratch" if _from_scratch(training) else NOT_STATED)),
        ("licence", license or NOT_STATED),
        ("parameters, total", checkpoint.total or training.total),
        ("parameters, active per token", checkpoint.active or training.active),
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
    return table(["fact", "value"], rows + ([("adapter", adapter)] if adapter else []))


def _from_scratch(training: TrainingFacts) -> bool:
    return any(stage.title == "base model" for stage in training.stages)


def loading(checkpoint: CheckpointFacts, training: TrainingFacts, name: str, base_model: str | None) -> str:
    """Code that loads it with hf_moe and without."""
    if checkpoint.is_adapter:
        return _load_adapter(checkpoint, training, name, base_model)
    ours = (checkpoint.model_type or training.model_type) == "hf_moe"
    lines = [
        f'model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}, experts_implementation="hf_moe")',
        *([f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})"] if checkpoint.has_tokenizer else []),
    ]
    classes = "AutoModelForCausalLM" + (", AutoTokenizer" if checkpoint.has_tokenizer else "")
    with_ours = ["import hf_moe  # registers", f"from transformers import {classes}", "", *lines]
    options = ", trust_remote_code=True" if ours else ""
    without = [
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(name)}{options})",
    ]
    return _with_and_without(with_ours, without)


def _load_adapter(checkpoint: CheckpointFacts, training: TrainingFacts, name: str, base_model: str | None) -> str:
    base = json.dumps(base_model or "the base model")
    ours = (checkpoint.model_type or training.model_type) == "hf_moe"
    lines = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM", ""]
    with_ours = [
        "import hf_moe  # registers",
        *lines,
        f'model = AutoModelForCausalLM.from_pretrained({base}, experts_implementation="hf_moe")',
        f"model = PeftModel.from_pretrained(model, {json.dumps(name)})",
        *(["hf_moe.accelerate_adapters(model)"] if checkpoint.adapter.get("peft_type") == "LORA" else []),
    ]
    if checkpoint.adapter.get("peft_type", "LORA") != "LORA":
        return fenced("\n".join(with_ours), "python") + "\n\nWithout hf_moe this kind of adapter does not load."
    without = [
        *lines,
        f"model = AutoModelForCausalLM.from_pretrained({base}{', trust_remote_code=True' if ours else ''})",
        f"model = PeftModel.from_pretrained(model, {json.dumps(name)})",
    ]
    return _with_and_without(with_ours, without)


def _with_and_without(with_ours: Sequence[str], without: Sequence[str]) -> str:
    ours, theirs = (fenced("\n".join(lines), "python") for lines in (with_ours, without))
    return f"{ours}\n\nWithout hf_moe installed:\n\n{theirs}"


def evaluation(results: Mapping[str, Any], training: TrainingFacts, plots: Sequence[str]) -> str:
    """Benchmarks with n and standard error, and bits per byte by domain."""
    parts = [_benchmarks(results), _domains(results, training)]
    if not any(parts):
        return f"Standard benchmarks: {NOT_MEASURED}. Bits per byte: {NOT_MEASURED}."
    parts = [parts[0] or f"Standard benchmarks: {NOT_MEASURED}.", *(part for part in parts[1:] if part)]
    return "\n\n".join([*parts, *_images(plots, "plots/bits_per_byte.png", "Bits per byte by domain")])


def _benchmarks(results: Mapping[str, Any]) -> str:
    rows = []
    for name, task in tables(results, "tasks").items():
        for metric, figure in tables(task, "metrics").items():
            value, stderr = take(figure, "value", float), take(figure, "stderr", float)
            shown = None if value is None else f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
            count, available = take(task, "num_samples", int), take(task, "num_available", int)
            version, shots = take(task, "version", float), take(task, "num_fewshot", int)
            part = count if count is None or count == available else f"first {count:,} of {cell(available)}"
            rows.append((name, None if version is None else f"{version:g}", shots, metric, shown, part))
    if not rows:
        return ""
    text = table(["task", "version", "few-shot", "metric", "value ± standard error", "documents"], rows)
    harness = f"{take(results, 'harness.name', str)} {take(results, 'harness.version', str)}"
    command = take(results, "command", str)
    told = f"Run with {cell(harness)} on {cell(take(results, 'device', str))}, {cell(take(results, 'date', str))}."
    return f"{text}\n\n{told}" + (f"\n\n{fenced(plain(command))}" if command else "")


def _domains(results: Mapping[str, Any], training: TrainingFacts) -> str:
    measured = [domain for domain in training.domains if any(value is not None for value in domain.bits.values())]
    parts = []
    if measured:
        variants = list(dict.fromkeys(variant for domain in measured for variant in domain.bits))
        has_change = {"before", "after"} <= set(variants)
        header = ["domain", "held-out bytes", *variants, *(["change"] if has_change else [])]
        rows = [
            (
                f"{domain.name} (new)" if domain.name == training.new_domain else domain.name,
                domain.held_out_bytes,
                *(domain.bits.get(variant) for variant in variants),
                *([_change(domain)] if has_change else []),
            )
            for domain in measured
        ]
        parts.append(table(header, rows))
    rows = [
        (name, take(domain, "bytes", int), take(domain, "metrics.bits_per_byte.value", float))
        for name, domain in tables(results, "domains").items()
    ]
    parts += [table(["text", "bytes", "bits per byte"], rows)] if rows else []
    return "\n\n".join([*parts, _BITS_NOTE]) if parts else ""


def _change(domain: Domain) -> str | None:
    before, after = domain.bits.get("before"), domain.bits.get("after")
    return None if before is None or after is None else f"{after - before:+.3f}"


def routing(found: RoutingFacts, training: TrainingFacts, plots: Sequence[str]) -> str:
    """Health, balance by layer, agreement with the base."""
    parts = [f"Health: {cell(found.verdict)}."] if found.verdict is None else [cell(found.verdict)]
    if found.layers:
        rows = [
            (_FIGURES[figure], *(found.figure(f"{figure}/{layer}") for layer in found.layers)) for figure in FIGURES
        ]
        parts.append(table(["layer", *found.layers], rows))
    elif training.load_entropy:
        header = ["load before training the adapter", *(f"layer {i}" for i in range(len(training.load_entropy)))]
        rows = [(_FIGURES["load_entropy"], *training.load_entropy)]
        if len(training.max_violation) == len(training.load_entropy):
            rows.append((_FIGURES["max_violation"], *training.max_violation))
        parts.append(table(header, rows))
    parts.append(_agreement(training))
    return "\n\n".join([*parts, *_images(plots, "plots/expert_load.png", "Load of each expert by layer and domain")])


def _agreement(training: TrainingFacts) -> str:
    agreed = [domain for domain in training.domains if domain.agreement]
    if not agreed:
        return f"Routing agreement with the base model: {NOT_MEASURED}."
    layers = max(len(domain.agreement) for domain in agreed)
    rows = [(domain.name, *domain.agreement, *([None] * (layers - len(domain.agreement)))) for domain in agreed]
    return table(["agreement", *(f"layer {i}" for i in range(layers))], rows) + f"\n\n{_AGREEMENT_NOTE}"


def training_part(found: TrainingFacts, plots: Sequence[str]) -> str:
    """Recipe, command, stages, settings, hardware, time, energy."""
    rows = [
        (stage.title, stage.steps, stage.tokens, _rate(stage.learning_rate), _seconds(stage.seconds), stage.last_loss)
        for stage in found.stages
    ]
    stages = table(["run", "steps", "tokens", "peak learning rate", "seconds", "last loss"], rows)
    energy = NOT_MEASURED if found.energy_kwh is None else f"{found.energy_kwh:.3f} kWh"
    recipe, hardware = cell(found.recipe or NOT_STATED), cell(found.hardware or NOT_STATED)
    told = f"Recipe: {recipe}. Hardware: {hardware}. Energy: {energy}."
    settings = ", ".join(f"{name} {_setting(value)}" for name, value in found.settings.items())
    parts = [
        stages if rows else f"Steps, tokens, time: {NOT_MEASURED}.",
        *(["Interrupted and continued: " + cell(", ".join(found.interrupted)) + "."] if found.interrupted else []),
        told,
        *([f"Settings: {cell(settings)}."] if settings else []),
        fenced(plain(found.command)) if found.command else f"Command: {NOT_STATED}.",
    ]
    return "\n\n".join([*parts, *_images(plots, "plots/loss.png", "Training loss and expert load")])


def _rate(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _seconds(value: float | None) -> str | None:
    return None if value is None else f"{value:,.0f}"


def _setting(value: Any) -> str:
    return plain(value if isinstance(value, str | int | float) or value is None else json.dumps(value, default=str))


def data(found: TrainingFacts) -> str:
    """Data sets and domains."""
    rows = [
        (domain.name, None if domain.share is None else f"{domain.share:.0%}", domain.documents, domain.tokens)
        for domain in found.domains
    ]
    if not rows:
        return f"Data and domains: {NOT_STATED}."
    return (
        table(["data set", "share of the rows", "documents", "tokens"], rows)
        + f"\n\nLicences of the data: {NOT_STATED}."
    )


def sample(found: TrainingFacts) -> str:
    """What it writes, with and without the adapter."""
    titles = {"prompt": "Prompt", "base": "Base model", "adapted": "With the adapter"}
    return "\n\n".join(f"{titles[part]}:\n\n{fenced(text)}" for part, text in found.sample.items() if part in titles)


def limits(results: Mapping[str, Any], training: TrainingFacts, total: int | None) -> str:
    """What the facts do not cover, said from the facts."""
    said = []
    if total is not None and total < 100_000_000:
        said.append(f"A small model ({total:,} parameters): it shows the method and knows little.")
    if not tables(results, "tasks"):
        said.append("No standard benchmark was run.")
    elif take(results, "settings.limit", float) is not None:
        said.append("The benchmarks were run on their first documents only: the standard errors are large.")
    said.append("No evaluation of safety or bias was made. One run, one seed.")
    said.append("The weights carry the licences of the base model and of the data; clear them before you publish.")
    return " ".join(said)


def citation(title: str, name: str) -> str:
    """BibTeX without made-up authors."""
    fields = {"title": _tex(title), "howpublished": _tex(name), "note": "made with hf-moe"}
    lines = [f"  {key} = {{{value}}}," for key, value in fields.items()]
    return fenced("\n".join(["@misc{hf_moe_model,", *lines, "}"]), "bibtex")


def _tex(text: str) -> str:
    return "".join(letter for letter in plain(text) if letter not in "{}\\")


def made_with(training: TrainingFacts, results: Mapping[str, Any]) -> str:
    """Versions of the libraries, and the day."""
    versions = {**(take(results, "versions", dict) or {}), **training.versions}
    date = training.date or take(results, "date", str)
    if not versions:
        return f"Versions: {NOT_STATED}."
    return f"Made on {cell(date or NOT_STATED)} with:\n\n" + table(["library", "version"], list(versions.items()))


def _images(plots: Sequence[str], path: str, title: str) -> list[str]:
    return [f"![{title}]({path})"] if path in plots else []
