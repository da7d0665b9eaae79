"""The part of a card on evaluation: benchmarks, what they lose without single experts, bits per byte by domain."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_moe.hub.cards.facts import tables, take
from hf_moe.hub.cards.markdown import NOT_MEASURED, cell, fenced, image, plain, table
from hf_moe.hub.cards.training_facts import DomainFacts, TrainingFacts

_BITS_NOTE = (
    "Bits per byte: the negative log2-likelihood of held-out text, divided by its bytes in UTF-8; lower is better. "
    "The numbers have no error bars."
)
_LEARNED_NOTE = " Of prompts and conversations only the part that is learned counts."
_CHOSEN_NOTE = " Of each held-out pair the chosen answer counts."
_MASKED_NOTE = (
    "The most used experts were masked, one at a time. The change is that of the metric on the same documents, with "
    "the 95 % interval of the paired difference."
)
# of TRL's, those that tell something across runs, with what they mean
_TRL = {
    "loss": "loss of TRL's trainer, in nats",
    "mean_token_accuracy": "share of tokens predicted right",
    "rewards/accuracies": "share of pairs whose chosen answer gained more than the rejected one",
    "rewards/margins": "how much more the chosen answer gained (reward margin)",
    "rewards/chosen": "reward of the chosen answers",
    "rewards/rejected": "reward of the rejected answers",
}

_MOST_MASKED = 20  # rows


def evaluation_section(results: Mapping[str, Any], training: TrainingFacts, plots: Sequence[str]) -> str:
    """Benchmarks with n and standard error, and bits per byte by domain."""
    benchmarks, bits = _benchmarks(results), _bits(results, training)
    if not benchmarks and not bits:
        return f"Standard benchmarks: {NOT_MEASURED}. Bits per byte: {NOT_MEASURED}."
    plot = image(plots, "plots/bits_per_byte.png", "Bits per byte of every domain, before and after training")
    parts = [benchmarks, _masked(results), _setup(results), bits, plot, _held_out(training)]
    return "\n\n".join(
        part for part in (*parts, "" if benchmarks else f"Standard benchmarks: {NOT_MEASURED}.") if part
    )


def _benchmarks(results: Mapping[str, Any]) -> str:
    rows: list[Sequence[Any]] = []
    for name, task in tables(results, "tasks").items():
        version, shots = take(task, "version", float), take(task, "num_fewshot", int)
        edition = None if version is None else f"{version:g}"
        rows += [(name, edition, shots, metric, value, _documents(task)) for metric, value in _metrics(task)]
    for name, group in tables(results, "groups").items():
        part = f"{len(take(group, 'tasks', list) or []):,} tasks"
        rows += [(f"{name} (all its tasks)", "-", "-", metric, value, part) for metric, value in _metrics(group)]
    if not rows:
        return ""
    return table(["task", "version", "few-shot", "metric", "value ± standard error", "documents"], rows)


def _metrics(entry: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    for metric, found in tables(entry, "metrics").items():
        value, stderr = take(found, "value", float), take(found, "stderr", float)
        text = None if value is None else f"{value:.4f}" + ("" if stderr is None else f" ± {stderr:.4f}")
        yield metric.removesuffix(",none"), text


def _documents(task: Mapping[str, Any]) -> Any:
    count, available = take(task, "num_samples", int), take(task, "num_available", int)
    return count if count is None or count == available else f"first {count:,} of {cell(available)}"


def _setup(results: Mapping[str, Any]) -> str:
    """Harness, device, date and command, and prompts that were cut."""
    circumstances = [
        f"{what} {cell(value)}"
        for what, value in (
            ("with", _harness(results)),
            ("on", take(results, "device", str)),
            ("on", take(results, "date", str)),
        )
        if value is not None
    ]
    cut = {name: take(task, "truncated_prompts", int) for name, task in tables(results, "tasks").items()}
    listed = ", ".join(f"{cell(name)} {count:,}" for name, count in cut.items() if count)
    command = take(results, "command", str)
    parts = [
        f"Evaluated {', '.join(circumstances)}." if circumstances else "",
        f"Prompts longer than the model's context lost their beginning: {listed}." if listed else "",
        fenced(plain(command)) if command else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _harness(results: Mapping[str, Any]) -> str | None:
    name, version = take(results, "harness.name", str), take(results, "harness.version", str)
    return None if name is None or version is None or not tables(results, "tasks") else f"{name} {version}"


def _bits(results: Mapping[str, Any], training: TrainingFacts) -> str:
    rows = [
        (name, take(domain, "bytes", int), take(domain, "metrics.bits_per_byte.value", float))
        for name, domain in tables(results, "domains").items()
    ]
    evaluated = table(["text", "bytes", "bits per byte"], rows) if rows else ""
    parts = [part for part in (_before_and_after(training), evaluated) if part]
    is_recipe = training.domains and training.new_domain is None
    note = _BITS_NOTE + ("" if not is_recipe else _CHOSEN_NOTE if training.is_dpo else _LEARNED_NOTE)
    return "\n\n".join([*parts, note]) if parts else ""


def _held_out(training: TrainingFacts) -> str:
    """TRL's own metrics of the held-out records."""
    rows = [(words, *training.held_out[name]) for name, words in _TRL.items() if name in training.held_out]
    return table(["held-out records, by TRL", "before", "after"], rows) if rows else ""


def _before_and_after(training: TrainingFacts) -> str:
    measured = [domain for domain in training.domains if any(value is not None for value in domain.bits.values())]
    if not measured:
        return ""
    variants = list(dict.fromkeys(variant for domain in measured for variant in domain.bits))
    has_change = {"before", "after"} <= set(variants)
    header = ["domain", *variants, *(["change"] if has_change else []), "held-out bytes"]
    rows = [
        (
            f"{domain.name} (new)" if domain.name == training.new_domain else domain.name,
            *(domain.bits.get(variant) for variant in variants),
            *([_change(domain)] if has_change else []),
            domain.held_out_bytes,
        )
        for domain in measured
    ]
    return table(header, rows)


def _change(domain: DomainFacts) -> str | None:
    return None if domain.change is None else f"{domain.change:+.3f}"


def _masked(results: Mapping[str, Any]) -> str:
    """The loss of each task and domain without its most used experts, by its first metric."""
    rows = []
    for name, entry in (*tables(results, "tasks").items(), *tables(results, "domains").items()):
        for masked in take(entry, "experts.masked", list) or []:
            share, documents = take(masked, "share", float), take(masked, "documents", int)
            expert = f"{_short(take(masked, 'layer', str))}, expert {take(masked, 'expert', int)}"
            for metric, found in list(tables(masked, "metrics").items())[:1]:
                change, low, high = (take(found, part, float) for part in ("difference", "low", "high"))
                if change is None or low is None or high is None:
                    continue
                interval = f"{change:+.4f} ({low:+.4f} to {high:+.4f})"
                used = None if share is None else f"{share:.1%}"
                rows.append((name, expert, used, metric.removesuffix(",none"), interval, documents))
    if not rows:
        return ""
    header = ["task or text", "masked", "share of the layer's load", "metric", "change (interval)", "documents"]
    left_out = f" The first {_MOST_MASKED} of {len(rows)}; results.json holds all." if len(rows) > _MOST_MASKED else ""
    return f"{table(header, rows[:_MOST_MASKED])}\n\n{_MASKED_NOTE}{left_out}"


def _short(layer: str | None) -> str:
    """`layer 3` for `model.layers.3.mlp`; the whole name where it holds more numbers than one."""
    numbers = [part for part in (layer or "").split(".") if part.isdigit()]
    return f"layer {numbers[0]}" if len(numbers) == 1 else str(layer)
