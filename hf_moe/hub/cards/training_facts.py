"""Facts of a training run, from the report of a recipe or of the quickstart, or a Trainer's `trainer_state.json`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hf_moe.hub.cards.emissions_facts import Emissions
from hf_moe.hub.cards.facts import numbers, tables, take

_BASE = "base model"
# the quickstart's own domains (`hf_moe.data.corpus`); a file of the user's cannot have their names
_EMBEDDED = {
    "code": "source of Python's standard library",
    "docs": "documentation and docstrings of Python",
    "legal": "licence texts of Python packages",
    "readme": "descriptions of Python packages",
    "arithmetic": "generated sums and word problems",
}


@dataclass(frozen=True)
class Stage:
    """One training run; None where the report does not tell."""

    title: str
    steps: int | None
    tokens: int | None = None
    learning_rate: float | None = None
    seconds: float | None = None
    last_loss: float | None = None


@dataclass(frozen=True)
class DomainFacts:
    """One data set. `bits`: bits per byte of its held-out text, by variant (before, after, ...)."""

    name: str
    share: float | None = None
    documents: int | None = None
    tokens: int | None = None
    held_out_bytes: int | None = None
    bits: Mapping[str, float | None] = field(default_factory=dict)
    agreement: tuple[float | None, ...] = ()

    @property
    def change(self) -> float | None:
        """Bits per byte after training minus before; None where one of them is not known."""
        before, after = self.bits.get("before"), self.bits.get("after")
        return None if before is None or after is None else after - before


@dataclass(frozen=True)
class SampleFacts:
    """What was written after `prompt`, a held-out one of `domain`; None where nothing was."""

    prompt: str
    before: str | None = None
    after: str | None = None
    domain: str | None = None


@dataclass(frozen=True)
class TrainingFacts:
    """A report, whoever wrote it; None and empty where it says nothing.

    `health`: the verdict on the routing in words, by variant (before, after). `texts`: by domain, what the text is.
    `sampling`: how the samples were drawn, in words. `held_out`: metrics by name, before and after, of TRL's trainer.
    """

    recipe: str | None = None
    date: str | None = None
    command: str | None = None
    base_model: str | None = None
    model_type: str | None = None
    new_domain: str | None = None
    hardware: str | None = None
    emissions: Emissions | None = None
    total: int | None = None
    active: int | None = None
    trained: int | None = None
    router_before: str | None = None
    router_after: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    domains: tuple[DomainFacts, ...] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    health: Mapping[str, str] = field(default_factory=dict)
    load_entropy: tuple[float | None, ...] = ()
    max_violation: tuple[float | None, ...] = ()
    loads_back: bool | None = None
    samples: tuple[SampleFacts, ...] = ()
    sampling: str = "greedily"
    held_out: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    interrupted: tuple[str, ...] = ()

    @property
    def is_from_scratch(self) -> bool:
        """True if the report tells of a base model's own training."""
        return any(stage.title == _BASE for stage in self.stages)

    @property
    def trained_on(self) -> list[str]:
        """Names of the domains that rows were drawn from."""
        return [domain.name for domain in self.domains if domain.share is None or domain.share > 0]

    @property
    def tuned_on(self) -> list[str]:
        """What it was made for: the report's new domain, or the first data set; the others are mixed in with it."""
        return [self.new_domain] if self.new_domain is not None else self.trained_on[:1]

    @property
    def is_dpo(self) -> bool:
        return self.recipe is not None and self.recipe.startswith("DPO")

    @property
    def router_is_same(self) -> bool | None:
        """None where one of the hashes is not known."""
        known = self.router_before is not None and self.router_after is not None
        return self.router_before == self.router_after if known else None


def training_facts(report: Mapping[str, Any], *, is_adapter: bool = True) -> TrainingFacts:
    """Facts of any of the three.

    Args:
        is_adapter: Whether the card is of an adapter: the quickstart's report holds those of its base model as well.
    """
    if "log_history" in report:
        return _of_trainer(report)
    common = {
        "recipe": take(report, "recipe", str),
        "date": take(report, "date", str),
        "command": take(report, "command", str),
        "hardware": _hardware(report),
        "health": {name: text for name, text in (take(report, "health", dict) or {}).items() if isinstance(text, str)},
        "versions": take(report, "versions", dict) or {},
        "settings": {key: value for key, value in (take(report, "choices", dict) or {}).items() if key != "model"}
        | (take(report, "training", dict) or {}),
    }
    if not ("base" in report and "adapter" in report):
        return _of_recipe(report, common)
    found = _of_quickstart(report, common)
    return found if is_adapter else _of_base(found, take(report, "base.router_sha256", str))


def _of_recipe(report: Mapping[str, Any], common: dict[str, Any]) -> TrainingFacts:
    steps, seconds = take(report, "steps", int), take(report, "seconds_per_step", float)
    spent = None if steps is None or seconds is None else steps * seconds
    rate = take(report, "choices.learning_rate", float) or take(report, "training.learning_rate", float)
    stage = Stage(
        common["recipe"] or "training", steps, take(report, "tokens", int), rate, spent, _last_loss(report, "log")
    )
    return TrainingFacts(
        **common,
        base_model=take(report, "choices.model", str),
        model_type=take(report, "model_type", str),
        total=take(report, "parameters.total", int),
        active=take(report, "parameters.active", int),
        trained=take(report, "parameters.trained", int),
        router_before=take(report, "router_sha256.before", str),
        router_after=take(report, "router_sha256.after", str),
        stages=(stage,),
        domains=tuple(_recipe_domain(name, each) for name, each in tables(report, "domains").items()),
        samples=tuple(_samples(report)),
        held_out=_held_out(report),
    )


def _samples(report: Mapping[str, Any]) -> Iterator[SampleFacts]:
    for each in take(report, "samples", list) or []:
        if (prompt := take(each, "prompt", str)) is not None:
            yield SampleFacts(prompt, *(take(each, part, str) for part in ("before", "after", "domain")))


def _held_out(report: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
    before, after = (take(report, f"held_out.{when}", dict) or {} for when in ("before", "after"))
    # names hold slashes and may hold dots: no paths
    return {name: (take({"x": before[name]}, "x", float), take({"x": after.get(name)}, "x", float)) for name in before}


def _recipe_domain(name: str, domain: dict[str, Any]) -> DomainFacts:
    return DomainFacts(
        name,
        take(domain, "share", float),
        take(domain, "examples", int),
        take(domain, "tokens", int),
        take(domain, "before.bytes", int),
        {variant: take(domain, f"{variant}.bits_per_byte", float) for variant in ("before", "after")},
        tuple(numbers(domain, "routing_agreement")),
    )


def _of_quickstart(report: Mapping[str, Any], common: dict[str, Any]) -> TrainingFacts:
    interrupted = tuple(str(part) for part in take(report, "interrupted", list) or [])
    new = take(report, "new_domain", str)
    prompt, before, after = (take(report, f"load_back.sample.{part}", str) for part in ("prompt", "base", "adapted"))
    return TrainingFacts(
        **common,
        model_type="hf_moe",
        new_domain=new,
        total=take(report, "base.parameters.total", int),
        active=take(report, "base.parameters.active", int),
        trained=take(report, "adapter.trainable_parameters", int),
        router_before=take(report, "adapter.router_sha256_before", str),
        router_after=take(report, "adapter.router_sha256_after", str),
        stages=_quickstart_stages(report, interrupted),
        domains=_quickstart_domains(report),
        texts=_EMBEDDED,
        load_entropy=tuple(numbers(report, "evaluation.balance_before.load_entropy")),
        max_violation=tuple(numbers(report, "evaluation.balance_before.max_violation")),
        loads_back=take(report, "load_back.logits_equal", bool),
        samples=() if prompt is None else (SampleFacts(prompt, before, after, new),),
        sampling="by sampling at a temperature of 0.7",
        interrupted=interrupted,
    )


def _quickstart_stages(report: Mapping[str, Any], interrupted: tuple[str, ...]) -> tuple[Stage, ...]:
    parts = ("base", _BASE, "learning_rate"), ("adapter", "adapter", "adapter_learning_rate")
    return tuple(
        Stage(
            title,
            take(report, f"{part}.steps", int),
            take(report, f"{part}.tokens", int),
            take(report, f"choices.{rate}", float),
            None if part in interrupted else take(report, f"seconds.{part}", float),
            _last_loss(report, f"{part}.log"),
        )
        for part, title, rate in parts
    )


def _quickstart_domains(report: Mapping[str, Any]) -> tuple[DomainFacts, ...]:
    bits, agreement = tables(report, "evaluation.bits_per_byte"), take(report, "evaluation.routing_agreement", dict)
    texts, new, replay = tables(report, "text"), take(report, "new_domain", str), take(report, "choices.replay", float)
    return tuple(
        DomainFacts(
            name,
            None if replay is None else 1 - replay if name == new else replay / max(1, len(texts) - 1),
            take(counts, "train_documents", int),
            take(counts, "train_tokens", int),
            take(counts, "held_out_bytes", int),
            {variant: take(values, name, float) for variant, values in bits.items()},
            tuple(numbers(agreement, name)),
        )
        for name, counts in texts.items()
    )


def _of_base(found: TrainingFacts, router: str | None) -> TrainingFacts:
    """The facts without those of the adapter: the base model saw an equal share of every domain but the new one."""
    share = 1 / max(1, len(found.domains) - 1)
    domains = [
        replace(
            domain,
            share=0.0 if domain.name == found.new_domain else share,
            bits={"bits per byte": domain.bits.get("before")},
            agreement=(),
        )
        for domain in found.domains
    ]
    return replace(
        found,
        trained=found.total,
        router_before=None,
        router_after=router,
        stages=found.stages[:1],
        domains=tuple(domains),
        health={name: text for name, text in found.health.items() if name == "before"},
        samples=tuple(replace(sample, after=None) for sample in found.samples),
    )


def _of_trainer(state: Mapping[str, Any]) -> TrainingFacts:
    log = [record for record in take(state, "log_history", list) or [] if isinstance(record, dict)]
    runtimes = [seconds for record in log if (seconds := take(record, "train_runtime", float)) is not None]
    rates = [rate for record in log if (rate := take(record, "learning_rate", float)) is not None]
    stage = Stage(
        "training",
        take(state, "global_step", int),
        take(state, "num_input_tokens_seen", int) or None,
        max(rates, default=None),
        runtimes[-1] if runtimes else None,
        _last_loss({"log": log}, "log"),
    )
    return TrainingFacts(recipe="transformers Trainer", stages=(stage,))


def _last_loss(report: Mapping[str, Any], path: str) -> float | None:
    log = take(report, path, list) or []
    return next((loss for record in reversed(log) if (loss := take(record, "loss", float)) is not None), None)


def _hardware(report: Mapping[str, Any]) -> str | None:
    parts = [take(report, f"machine.{name}", str) for name in ("device", "architecture")]
    threads, processes = (take(report, f"machine.{name}", int) for name in ("torch_threads", "processes"))
    if threads is not None:
        parts.append("1 thread" if threads == 1 else f"{threads} threads")
    if processes is not None and processes > 1:
        parts.append(f"{processes} processes")
    return ", ".join(part for part in parts if part is not None) or None
