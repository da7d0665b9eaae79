"""Thresholds in a YAML file that measured metrics of a model's routing must keep.

    checks:
      - agreement.min >= 0.9
      - dead_experts == 0
      - bits_per_byte.worst_domain <= +0.02

One comparison a line, `metric operator number`; the metrics are those of `METRICS`. Thresholds that could never fail,
or never pass, are refused when they are read.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from hf_moe.observability.threshold_metrics import METRICS, ORDER, Metric, domain_of, metric_named

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "==": lambda value, threshold: value == threshold,
    ">=": lambda value, threshold: value >= threshold,
    "<=": lambda value, threshold: value <= threshold,
    ">": lambda value, threshold: value > threshold,
    "<": lambda value, threshold: value < threshold,
}
LARGEST_FILE = 100_000  # bytes
_CHECK = re.compile(r"(?P<metric>\S+)\s+(?P<operator>\S+)\s+(?P<number>\S+)", re.ASCII)
_NUMBER = re.compile(r"(?P<sign>[+-]?)([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", re.ASCII)
_FORM = "Write 'metric operator number', such as 'agreement.min >= 0.9'."


class ThresholdsError(ValueError):
    """Thresholds that cannot be used; names the file, the line, the rule and the way out."""


@dataclass(frozen=True)
class MetricValue:
    """A measured value.

    Attributes:
        value: None if it could not be measured.
        note: The place of the value (the worst layer), or the reason why there is none.
    """

    value: float | None
    note: str = ""


@dataclass(frozen=True)
class Check:
    """One line of the thresholds."""

    metric: str
    operator: str
    threshold: float
    line: int
    text: str

    def judge(self, metrics: Mapping[str, MetricValue]) -> "CheckResult":
        measured = metrics.get(self.metric, MetricValue(None, "this comparison does not measure it"))
        holds = measured.value is not None and OPERATORS[self.operator](measured.value, self.threshold)
        return CheckResult(self, measured, holds)


@dataclass(frozen=True)
class CheckResult:
    """A check and what was measured. A metric that could not be measured, or is NaN, fails its check."""

    check: Check
    measured: MetricValue
    passed: bool

    def __str__(self) -> str:
        place = f"line {self.check.line}: {self.check.text}"
        if self.measured.value is None:
            return f"{place}: not measured: {self.measured.note}"
        note = f" ({self.measured.note})" if self.measured.note else ""
        return f"{place}: measured {format_value(self.check.metric, self.measured.value)}{note}"


@dataclass(frozen=True)
class Verdict:
    """The results of all checks on one set of metrics."""

    source: str
    results: tuple[CheckResult, ...]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        return tuple(result for result in self.results if not result.passed)

    def __str__(self) -> str:
        held = len(self.results) - len(self.failures)
        head = f"{self.source}: {'passed' if self.passed else 'FAILED'}, {held} of {len(self.results)} checks hold"
        return "\n".join([head, *(f"  failed: {result}" for result in self.failures)])

    def to_dict(self) -> dict[str, Any]:
        """JSON values; NaN and infinity as text."""
        return {
            "gate": self.source,
            "passed": self.passed,
            "checks": [
                {
                    **asdict(result.check),
                    "measured": json_number(result.measured.value),
                    "note": result.measured.note,
                    "passed": result.passed,
                }
                for result in self.results
            ],
        }


@dataclass(frozen=True)
class RoutingThresholds:
    """Checks that must all hold.

    Attributes:
        checks: In the order of the file.
        source: The file, for messages.
    """

    checks: tuple[Check, ...]
    source: str = "thresholds"

    @classmethod
    def parse(cls, lines: Sequence[str], source: str = "thresholds") -> "RoutingThresholds":
        """Read lines such as `["agreement.min >= 0.9"]`.

        Raises:
            ThresholdsError: If a line cannot be used, or lines contradict each other.
        """
        return _thresholds([(text, number) for number, text in enumerate(lines, start=1)], source)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingThresholds":
        """Read a file of thresholds.

        Raises:
            ThresholdsError: If the file or a line in it cannot be used.
            OSError: If it cannot be read.
        """
        return _thresholds(_lines(_text(Path(path)), str(path)), str(path))

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that its checks name."""
        return tuple(dict.fromkeys(name for check in self.checks if (name := domain_of(check.metric)) is not None))

    def require(self, is_measured: Callable[[str], bool], where: str) -> None:
        """Refuse checks of metrics that will not be measured, before anything is.

        Raises:
            ThresholdsError: Naming the first such check.
        """
        for check in self.checks:
            if not is_measured(check.metric):
                raise ThresholdsError(
                    f"{self.source}, line {check.line}: {check.metric!r} is not measured {where}. Take the line out."
                )

    def require_domains(self, domains: Sequence[str]) -> None:
        """Refuse checks of domains that there are not.

        Raises:
            ThresholdsError: Naming the first such check.
        """
        for check in self.checks:
            name = domain_of(check.metric)
            if name is not None and name not in domains:
                raise ThresholdsError(
                    f"{self.source}, line {check.line}: there is no domain {name!r}; the texts are of "
                    f"{', '.join(domains)}. Name one of them, or add its text."
                )

    def judge(self, metrics: Mapping[str, MetricValue]) -> Verdict:
        return Verdict(self.source, tuple(check.judge(metrics) for check in self.checks))


def format_value(metric: str, value: float) -> str:
    """Format a value for reading: counts as whole numbers, changes with their sign."""
    known = metric_named(metric)
    if known is not None and known.is_count and math.isfinite(value):
        return str(int(value))
    return f"{value:+.4g}" if known is not None and known.is_change else f"{value:.4g}"


def json_number(value: float | None) -> float | str | None:
    """Make a value one that JSON can hold: NaN and infinity become text."""
    return value if value is None or math.isfinite(value) else str(value)


def _text(path: Path) -> str:
    data = path.read_bytes()
    if len(data) > LARGEST_FILE:
        raise ThresholdsError(
            f"{path}: a file of thresholds has at most {LARGEST_FILE:,} bytes, got {len(data):,}. Is it another file?"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ThresholdsError(f"{path}: not UTF-8 text (byte {error.start}). Save the file as UTF-8.") from error


def _lines(text: str, source: str) -> list[tuple[str, int]]:
    """The texts under `checks` with their line numbers; read as nodes, because values have lost the lines."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}" if mark is not None else ""
        raise ThresholdsError(f"{source}{place}: not valid YAML: {error.problem}. Mend the line.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ThresholdsError(
            f"{source}: not valid YAML ({type(error).__name__}). Thresholds are 'checks:' and a list."
        ) from error
    if not isinstance(root, yaml.MappingNode):
        raise ThresholdsError(
            f"{source}: thresholds must be a mapping with the key 'checks', got {_kind(root)}. {_EXAMPLE}"
        )
    return _under_checks(root, source)


_EXAMPLE = "Write 'checks:' and below it a list, such as '- agreement.min >= 0.9'."


def _under_checks(root: yaml.MappingNode, source: str) -> list[tuple[str, int]]:
    found: yaml.Node | None = None
    for key, value in root.value:
        line = key.start_mark.line + 1
        if key.value != "checks":
            near = get_close_matches(str(key.value), METRICS, n=1)
            hint = f"Write it as a line under 'checks:', '- {near[0]} >= ...'." if near else "The one key is 'checks'."
            raise ThresholdsError(f"{source}, line {line}: unknown key {_quoted(key)}. {hint}")
        if found is not None:
            raise ThresholdsError(f"{source}, line {line}: the key 'checks' is there twice. Join the two lists.")
        found = value
    if not isinstance(found, yaml.SequenceNode):
        raise ThresholdsError(f"{source}: 'checks' must be a list, got {_kind(found)}. {_EXAMPLE}")
    lines = []
    for node in found.value:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
            raise ThresholdsError(f"{source}, line {line}: a check must be a text, got {_kind(node)}. {_FORM}")
        lines.append((node.value, line))
    return lines


def _kind(node: yaml.Node | None) -> str:
    if node is None:
        return "nothing"
    return _quoted(node) if isinstance(node, yaml.ScalarNode) else f"a {node.id}".replace("sequence", "list")


def _quoted(node: yaml.Node) -> str:
    return repr(node.value)[:60] if isinstance(node, yaml.ScalarNode) else f"of a {node.id}"


def _thresholds(lines: list[tuple[str, int]], source: str) -> RoutingThresholds:
    if not lines:
        raise ThresholdsError(f"{source}: there is no check: anything would pass. {_EXAMPLE}")
    checks = tuple(_check(text, line, f"{source}, line {line}") for text, line in lines)
    _refuse_contradictions(checks, source)
    return RoutingThresholds(checks, source)


def _check(text: str, line: int, where: str) -> Check:
    parts = _CHECK.fullmatch(text.strip())
    if parts is None:
        raise ThresholdsError(f"{where}: {text[:80]!r} is no check. {_FORM}")
    name, operator = parts["metric"], parts["operator"]
    metric = metric_named(name)
    if metric is None:
        near = get_close_matches(name, METRICS, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(METRICS)}."
        raise ThresholdsError(f"{where}: unknown metric {name[:60]!r}. {hint}")
    if operator not in OPERATORS:
        raise ThresholdsError(f"{where}: the operator must be one of {' '.join(OPERATORS)}, got {operator[:10]!r}.")
    check = Check(name, operator, _number(parts["number"], metric, where), line, text.strip())
    _refuse_pointless(check, metric, where)
    return check


def _number(text: str, metric: Metric, where: str) -> float:
    found = _NUMBER.fullmatch(text)
    if found is None:
        raise ThresholdsError(
            f"{where}: the threshold must be a finite decimal number without quotes, got {text[:40]!r}. {_FORM}"
        )
    value = float(text)
    if not math.isfinite(value):
        raise ThresholdsError(f"{where}: the threshold {text[:40]} is too large for a number. Write a smaller one.")
    if metric.is_change and value and not found["sign"]:
        raise ThresholdsError(
            f"{where}: {metric.name} is {metric.meaning}: write the sign, +{text} for at most so much more or -{text} "
            "for less."
        )
    return value


@dataclass(frozen=True)
class _Interval:
    """The values from `low` to `high` that a check lets pass; an open end does not count itself."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def meet(self, other: "_Interval") -> "_Interval":
        low, low_open = max((self.low, self.low_open), (other.low, other.low_open))
        high, inner = min((self.high, not self.high_open), (other.high, not other.high_open))
        return _Interval(low, high, low_open, not inner)

    @property
    def is_empty(self) -> bool:
        return self.low > self.high or (self.low == self.high and (self.low_open or self.high_open))


def _passing(check: Check, metric: Metric) -> _Interval:
    value = check.threshold
    if metric.is_count:  # < 1 is <= 0
        if check.operator == "<":
            return _Interval(high=math.ceil(value) - 1)
        if check.operator == ">":
            return _Interval(low=math.floor(value) + 1)
    return {
        "==": _Interval(value, value),
        ">=": _Interval(low=value),
        "<=": _Interval(high=value),
        ">": _Interval(low=value, low_open=True),
        "<": _Interval(high=value, high_open=True),
    }[check.operator]


def _refuse_pointless(check: Check, metric: Metric, where: str) -> None:
    """Refuse a check that no measurement, or every measurement, keeps."""
    possible = _Interval(metric.low, metric.high)
    if metric.is_count and not check.threshold.is_integer():
        raise ThresholdsError(
            f"{where}: {metric.name} is a whole number, got {check.threshold:g}. Write a whole number."
        )
    passing = possible.meet(_passing(check, metric))
    if passing.is_empty:
        raise ThresholdsError(
            f"{where}: {check.text!r} can never hold: {metric.name} is {metric.range_text}. Choose a threshold there."
        )
    if passing == possible:
        raise ThresholdsError(
            f"{where}: {check.text!r} always holds: {metric.name} is {metric.range_text}. Tighten it, or take it out."
        )
    if check.operator == "==" and not metric.is_count and check.threshold not in (metric.low, metric.high, 0.0):
        raise ThresholdsError(
            f"{where}: {metric.name} is measured, and no measurement is exactly {check.threshold:g}. Use >= or <=."
        )


def _refuse_contradictions(checks: Sequence[Check], source: str) -> None:
    """Refuse two checks that no model keeps together, or that bound the same thing twice."""
    for position, check in enumerate(checks):
        for earlier in checks[:position]:
            pair = f"{source}, lines {earlier.line} and {check.line}: {earlier.text!r} and {check.text!r}"
            if (earlier.metric, earlier.operator) == (check.metric, check.operator):
                raise ThresholdsError(f"{pair} bound the same thing twice. Keep one of them.")
            if _contradict(earlier, check) or _contradict(check, earlier):
                raise ThresholdsError(f"{pair} cannot both hold. Change one of them.")


def _contradict(one: Check, two: Check) -> bool:
    """Whether no metrics keep both, where `one` is of the same metric or of one that is never above that of `two`."""
    metrics = [metric_named(check.metric) for check in (one, two)]
    if metrics[0] is None or metrics[1] is None:
        return False
    first, second = _passing(one, metrics[0]), _passing(two, metrics[1])
    if one.metric == two.metric:
        return first.meet(second).is_empty
    if (metrics[0].name, metrics[1].name) not in ORDER:
        return False
    above = _Interval(low=first.low, low_open=first.low_open)
    return above.meet(_Interval(high=second.high, high_open=second.high_open)).is_empty
