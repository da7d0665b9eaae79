"""Expert counts of a serving process, how many assignments each expert got: read from JSON lines or Prometheus text.
Input is not trusted.

JSON lines, one record for each layer and moment; `counts` are the assignments since the record before, `total` those
since the process started, one entry for each expert; `process` tells several writers apart:

    {"layer": "model.layers.0.mlp", "total": [812, 790, 644, 901], "process": "worker-0"}

Prometheus text, one file for each scrape, oldest first:

    hf_moe_expert_assignments_total{layer="model.layers.0.mlp",expert="3"} 901

Totals are added up as Prometheus' `increase` does: the difference of two moments; a total that fell was reset by a
restart and counts from 0. The first of several totals only begins the count; one alone counts whole.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRIC = "hf_moe_expert_assignments_total"
FORMATS = ("auto", "jsonl", "prometheus")
MOST_EXPERTS = 65_536
LONGEST_LINE = 1_000_000  # bytes
LARGEST_COUNT = 2**53  # exact in a float, as Prometheus holds it

_LABEL = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*(,|$)', re.ASCII)
# possessive: a hostile line costs no more than its length
_SAMPLE = re.compile(
    r"""([a-zA-Z_:][a-zA-Z0-9_:]*+)                      # name
        (?:\s*+\{((?:[^"}]|"(?:[^"\\]|\\.)*+")*+)\})?   # labels
        \s++(\S++)                                       # value
        (?:\s++-?[0-9.]++)?(?:\s++\#.*)?                 # time, exemplar""",
    re.ASCII | re.VERBOSE,
)
_ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}


class CountsError(ValueError):
    """An export that cannot be used; names the file, the line, the rule and the way out."""


@dataclass
class ServedCounts:
    """Assignments by layer and expert over the whole window.

    Attributes:
        counts: By layer as it is named in the export, and by expert id.
        records: Lines that were used.
        notes: What deserves attention: resets, a cut line; one sentence each.
    """

    counts: dict[str, dict[int, int]] = field(default_factory=dict)
    records: int = 0
    notes: list[str] = field(default_factory=list)

    def add(self, layer: str, experts: Mapping[int, int]) -> None:
        mine = self.counts.setdefault(layer, {})
        for expert, count in experts.items():
            mine[expert] = mine.get(expert, 0) + count


def read_served_counts(paths: Sequence[Path], *, format: str = "auto", metric: str = METRIC) -> ServedCounts:
    """Read exports of one format.

    Args:
        paths: Of the exports, oldest first.
        format: "jsonl", "prometheus", or "auto": by the first character of each file.
        metric: Name of the Prometheus counter; it has the labels `layer` and `expert`.

    Raises:
        CountsError: For a line that cannot be used, or if there is no count at all.
        OSError: If a file cannot be read.
    """
    if format not in FORMATS:
        raise CountsError(f"the format must be one of {', '.join(FORMATS)}, got {format!r}.")
    found = ServedCounts()
    totals = _Totals(found)
    for path in paths:
        kind = _format_of(path) if format == "auto" else format
        if kind == "jsonl":
            _read_json_lines(path, found, totals)
        else:
            _read_scrape(path, metric, found, totals)
    totals.finish()
    if not found.counts:
        raise CountsError(
            f"{', '.join(map(str, paths))}: no expert counts. Prometheus text needs the counter {metric}{{layer=, "
            "expert=}; JSON lines need 'layer' with 'counts' or 'total'."
        )
    return found


def json_line(layer: str, total: Sequence[int], process: str | None = None) -> str:
    """One record of JSON lines, as `read_served_counts` reads it; with its line end."""
    record: dict[str, Any] = {"layer": layer, "total": list(total)}
    return json.dumps(record if process is None else {**record, "process": process}) + "\n"


def prometheus_text(totals: Mapping[str, Sequence[int]], metric: str = METRIC) -> str:
    """A scrape of counters by layer, as `read_served_counts` reads it and Prometheus scrapes it."""
    lines = [f"# HELP {metric} Assignments of tokens to an expert.", f"# TYPE {metric} counter"]
    for layer, counts in totals.items():
        name = layer.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        lines += [f'{metric}{{layer="{name}",expert="{expert}"}} {count}' for expert, count in enumerate(counts)]
    return "\n".join(lines) + "\n"


class _Totals:
    """Counters of processes that may restart."""

    def __init__(self, found: ServedCounts):
        self.found = found
        self.last: dict[tuple[str, str], dict[int, int]] = {}
        self.alone: set[tuple[str, str]] = set()
        self.resets: dict[tuple[str, str], int] = {}
        self.widths: dict[str, int] = {}  # entries of a layer's lists

    def add(self, process: str, layer: str, total: dict[int, int]) -> None:
        key = (process, layer)
        before = self.last.get(key)
        if before is None:
            self.alone.add(key)
        else:
            self.alone.discard(key)
            # one counter that fell means that the process restarted, and all its counters with it
            was_reset = any(total.get(expert, 0) < count for expert, count in before.items())
            if was_reset:
                self.resets[key] = self.resets.get(key, 0) + 1
            start = {} if was_reset else before
            self.found.add(layer, {expert: count - start.get(expert, 0) for expert, count in total.items()})
        self.last[key] = total

    def finish(self) -> None:
        """Add the counters that were seen once, whole, with a note where others have a window."""
        for (process, layer), times in self.resets.items():
            self.found.notes.append(
                f"The counters of layer {layer!r}{_of(process)} were reset {times} times: counted from 0 again."
            )
        for process, layer in sorted(self.alone):
            self.found.add(layer, self.last[process, layer])
            if len(self.alone) < len(self.last):
                text = f"Layer {layer!r}{_of(process)} has one total: counted since its process started."
                self.found.notes.append(text)


def _of(process: str) -> str:
    return f" of {process}" if process else ""


def _format_of(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(1000).lstrip()
    return "jsonl" if start.startswith(b"{") else "prometheus"


def _lines(path: Path) -> Iterator[tuple[int, str, bool]]:
    """Number, text, and whether the line has its end."""
    with open(path, "rb") as file:
        for number, data in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            if len(data) > LONGEST_LINE:
                raise CountsError(f"{path}, line {number}: longer than {LONGEST_LINE:,} bytes. Is it another file?")
            try:
                text = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                if not data.endswith(b"\n"):
                    text = data.decode("utf-8", "replace")  # cut within a character: the caller decides
                else:
                    raise CountsError(
                        f"{path}, line {number}: not UTF-8 text (byte {error.start}). Export it again."
                    ) from error
            yield number, text.rstrip("\r\n"), data.endswith(b"\n")


def _read_json_lines(path: Path, found: ServedCounts, totals: _Totals) -> None:
    for number, line, is_whole in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            if not is_whole:
                found.notes.append(f"{where}: the last line is cut off; it is left out.")
                continue
            raise CountsError(f"{where}: not valid JSON ({error}). Each line holds one JSON object.") from error
        _add_record(record, where, found, totals)
        found.records += 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("a key is there twice")
    return record


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _add_record(record: Any, where: str, found: ServedCounts, totals: _Totals) -> None:
    if not isinstance(record, dict):
        raise CountsError(f"{where}: must be a JSON object, got {type(record).__name__}.")
    kinds = [key for key in ("counts", "total") if key in record]
    if len(kinds) != 1:
        keys = ", ".join(map(repr, list(record)[:8])) or "nothing"
        raise CountsError(
            f"{where}: must have either 'counts' (since the record before) or 'total' (since the process started), "
            f"got {keys:.200}."
        )
    layer, process = record.get("layer"), record.get("process", "")
    if isinstance(layer, bool) or not isinstance(layer, str | int) or not isinstance(process, str):
        raise CountsError(f"{where}: 'layer' must be a name or a number and 'process' a text.")
    values = record[kinds[0]]
    if not isinstance(values, list) or not 1 <= len(values) <= MOST_EXPERTS:
        raise CountsError(f"{where}: {kinds[0]!r} must be a list of 1 to {MOST_EXPERTS:,} counts, one an expert.")
    if (width := totals.widths.setdefault(str(layer), len(values))) != len(values):
        raise CountsError(
            f"{where}: {kinds[0]!r} has {len(values):,} entries, and layer {str(layer)[:80]!r} had {width:,} before: "
            "these are two models. Export each into a file of its own."
        )
    experts = {expert: _count(value, where) for expert, value in enumerate(values)}
    if kinds[0] == "counts":
        found.add(str(layer), experts)
    else:
        totals.add(process, str(layer), experts)


def _count(value: Any, where: str) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= LARGEST_COUNT or value != math.floor(value):
        raise CountsError(f"{where}: a count must be a whole number from 0 to 2**53, got {str(value)[:40]}.")
    return int(value)


def _read_scrape(path: Path, metric: str, found: ServedCounts, totals: _Totals) -> None:
    """One scrape. A cut one is refused: the experts behind the cut would look dead."""
    series: dict[tuple[str, str], dict[int, int]] = {}
    for number, line, is_whole in _lines(path):
        where = f"{path}, line {number}"
        if not is_whole:
            raise CountsError(
                f"{where}: the text is cut off (its last line has no line end), so that experts are missing. Scrape "
                "it again."
            )
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        sample = _SAMPLE.fullmatch(line.strip())
        if sample is None:
            raise CountsError(f"{where}: not Prometheus text: {line[:60]!r}. A line is 'name{{labels}} value'.")
        if sample[1] != metric:
            continue
        labels = _labels(sample[2] or "", where)
        layer, expert = labels.pop("layer", None), labels.pop("expert", None)
        if layer is None or expert is None:
            raise CountsError(f"{where}: {metric} must have the labels 'layer' and 'expert'.")
        process = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
        experts = series.setdefault((process, layer), {})
        if (key := _expert(expert, where)) in experts:
            raise CountsError(f"{where}: the series of layer {layer!r} and expert {key} is there twice.")
        experts[key] = _count(_float(sample[3], where), where)
        found.records += 1
    for (process, layer), experts in series.items():
        totals.add(process, layer, experts)


def _labels(text: str, where: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    position = 0
    while position < len(text):
        found = _LABEL.match(text, position)
        if found is None or found[1] in labels:
            raise CountsError(f'{where}: labels must be different and of the form name="value", got {text[:80]!r}.')
        labels[found[1]] = re.sub(r"\\.", lambda escape: _ESCAPES.get(escape[0], escape[0]), found[2])
        position = found.end()
    return labels


def _expert(text: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or int(text) >= MOST_EXPERTS:
        raise CountsError(
            f"{where}: the label 'expert' must be a number from 0 to {MOST_EXPERTS - 1}, got {text[:40]!r}."
        )
    return int(text)


def _float(text: str, where: str) -> float:
    try:
        if "_" in text or not text.isascii():  # Python reads 1_000, Prometheus does not
            raise ValueError(text)
        value = float(text)
    except ValueError as error:
        raise CountsError(f"{where}: the value must be a number, got {text[:40]!r}.") from error
    if not math.isfinite(value):
        raise CountsError(f"{where}: a counter must be finite, got {text}.")
    return value


def by_layer_name(found: Iterable[str], layers: Sequence[str]) -> dict[str, str]:
    """The model's layer for each name in an export: the same name, or the number of the layer within it.

    Raises:
        CountsError: For a name that fits no layer, or two names that fit one.
    """
    numbers: dict[str, list[str]] = {}
    for layer in layers:
        if parts := re.findall(r"(?<![^.])[0-9]+(?![^.])", layer):
            numbers.setdefault(parts[-1], []).append(layer)
    matched: dict[str, str] = {}
    for name in found:
        candidates = [name] if name in layers else numbers.get(name, [])
        if len(candidates) != 1:
            why = f"{len(candidates)} layers have this number" if candidates else "there is no such layer"
            raise CountsError(
                f"the export has a layer {name[:80]!r}: {why} in the baseline. Its layers: {_short(layers)}. Export "
                "the names of the MoE layers."
            )
        if candidates[0] in matched.values():
            raise CountsError(f"the export names the layer {candidates[0]!r} twice, once as {name[:80]!r}.")
        matched[name] = candidates[0]
    return matched


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
