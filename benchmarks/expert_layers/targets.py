"""Targets that were promised, and verdicts on the results."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .cases import DECODE, FORWARD, LORA, TRAIN
from .contestants import HF_MOE

Record = Mapping[str, Any]


class Verdict(NamedTuple):
    """`worst` is the largest value among the cases of a target, at the case `where`; None if none was measured."""

    what: str
    limit: float
    unit: str
    worst: float | None
    where: str

    @property
    def says(self) -> str:
        return "not measured" if self.worst is None else "met" if self.worst <= self.limit else "missed"


@dataclass(frozen=True)
class Target:
    """`value` of every case whose fields equal those in `where` is at most `limit`."""

    what: str
    limit: float
    unit: str
    value: str
    where: tuple[tuple[str, Any], ...]

    def verdict(self, cases: Mapping[str, Record]) -> Verdict:
        found = [
            (value, key)
            for key, record in cases.items()
            if all(_field(record, name) in wanted for name, wanted in self.where)
            and (value := VALUES[self.value](record)) is not None
        ]
        return Verdict(self.what, self.limit, self.unit, *(max(found) if found else (None, "")))


def _field(record: Record, name: str) -> Any:
    return record["layer"][name] if name in record["layer"] else record[name]


def ratio(record: Record) -> float | None:
    return record["results"].get(HF_MOE, {}).get("to_best_native")


def saved_share(record: Record) -> float | None:
    """Bytes saved for backward, as a share of `grouped_mm`'s."""
    ours, native = (record["results"].get(name, {}).get("saved_bytes") for name in (HF_MOE, "grouped_mm"))
    return ours / native if ours is not None and native else None


def _of_ours(record: Record, field: str) -> float | None:
    return record["results"].get(HF_MOE, {}).get(field)


def _saved_gb(record: Record) -> float | None:
    saved = _of_ours(record, "saved_bytes")
    return None if saved is None else saved / 1e9


VALUES = {
    "ratio": ratio,
    "saved share": saved_share,
    "ms": lambda record: _of_ours(record, "ms"),
    "saved GB": _saved_gb,
}


def _where(**fields: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value if isinstance(value, tuple) else (value,)) for name, value in fields.items())


_NATIVE = "times the best native"
_E64 = {"num_experts": 64, "routing": "uniform"}
_QWEN3 = {"name": "Qwen3-30B-A3B", "routing": "uniform"}
CPU = (
    Target("E=64, T=1, forward", 0.87, _NATIVE, "ratio", _where(**_E64, tokens=1, mode=FORWARD)),
    Target("E=64, T=16 and 64, forward", 0.7, _NATIVE, "ratio", _where(**_E64, tokens=(16, 64), mode=FORWARD)),
    Target("E=64, T=512, forward", 0.85, _NATIVE, "ratio", _where(**_E64, tokens=512, mode=FORWARD)),
    Target("E=64, T=512, training", 0.75, _NATIVE, "ratio", _where(**_E64, tokens=512, mode=TRAIN)),
    Target("E=64, T=2048, training", 0.85, _NATIVE, "ratio", _where(**_E64, tokens=2048, mode=TRAIN)),
    Target("every size, dtype, mode", 1.0, _NATIVE, "ratio", ()),
    Target("saved for backward, every size", 0.6, "of grouped_mm's bytes", "saved share", _where(mode=TRAIN)),
)
H100 = (
    Target("Qwen3-30B-A3B, T=8192, forward", 1.3, "ms", "ms", _where(**_QWEN3, tokens=8192, mode=FORWARD)),
    Target("Qwen3-30B-A3B, T=8192, training", 4.5, "ms", "ms", _where(**_QWEN3, tokens=8192, mode=TRAIN)),
    Target("Qwen3-30B-A3B, T=8192, LoRA r=16", 3.8, "ms", "ms", _where(**_QWEN3, tokens=8192, mode=LORA)),
    Target("the same, saved for backward", 0.3, "GB", "saved GB", _where(**_QWEN3, tokens=8192, mode=LORA)),
    Target("Qwen3-30B-A3B, decode, batch 1", 0.050, "ms", "ms", _where(**_QWEN3, tokens=1, mode=DECODE)),
    Target("Qwen3-30B-A3B, decode, batch 16", 0.320, "ms", "ms", _where(**_QWEN3, tokens=16, mode=DECODE)),
)
TARGETS = {"experts_cpu": CPU, "experts_cuda": H100}


def verdicts(data: Mapping[str, Any]) -> list[Verdict]:
    return [target.verdict(data["cases"]) for target in TARGETS[data["plan"]]]


def verdict_table(found: Iterable[Verdict]) -> str:
    """Markdown."""
    lines = ["| target | at most | worst | at | |", "|---|---|---|---|---|"]
    for verdict in found:
        worst = "-" if verdict.worst is None else f"{verdict.worst:.3g}"
        lines.append(
            f"| {verdict.what} | {verdict.limit:g} {verdict.unit} | {worst} | {verdict.where} | {verdict.says} |"
        )
    return "\n".join(lines)
