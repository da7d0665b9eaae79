"""The record of what the routers of a model did: load, weights and entropy, by layer and by domain."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_moe.io.installation import install_command
from hf_moe.observability.health import Health, diagnose
from hf_moe.observability.layer_statistics import LayerStatistics
from hf_moe.observability.token_table import TokenTable
from hf_moe.observability.trace_files import StoredTrace, load_trace, save_trace

if TYPE_CHECKING:
    import pandas

TraceSource = Callable[[], Mapping[str | None, Sequence[LayerStatistics]]]

# metrics of a layer, each with the function that picks the worst layer's value
_WORST: dict[str, Callable[..., float]] = {
    "load_cv": max,
    "max_violation": max,
    "load_entropy": min,
    "router_entropy": min,
    "margin": min,
    "empty_share": max,
    "drop_share": max,
}


class RoutingTrace:
    """Statistics of every MoE layer, by domain, and the single tokens where they were recorded.

    Made by `record_routing`, `trace_texts` or `RoutingTrace.load`.

    Attributes:
        layers: Names of the MoE layers without the prefixes of wrappers, in the model's order.
        domains: Names given with `domain`, in the order of their first tokens.
        model_facts: What was traced, JSON values: `model_class`, `model_type`, `dtype`, `parameters`,
            `active_parameters`, `layers` (their number), `experts` and `top_k` (a list where layers differ),
            `router_scores` (by layer how logits become weights, null where unknown), `detail`.
        tokens: The table of tokens (`detail="tokens"`), or None. It can be read when the recording has ended.
        source: While a recording runs, the function that hands over the sums since its last call, by domain; else
            None. The sums stay on the model's device until the trace is read.
    """

    def __init__(
        self, empty: Sequence[LayerStatistics], model_facts: dict[str, Any], *, source: TraceSource | None = None
    ):
        """`empty`: for each layer, in order, the statistics of no token (`empty_statistics`)."""
        self._empty = {statistics.name: statistics for statistics in empty}
        # None holds what was seen outside of every domain
        self._parts: dict[str | None, dict[str, LayerStatistics]] = {}
        self._domain: str | None = None
        self._token_texts: Sequence[Sequence[str]] | None = None
        self._is_reduced = False
        self.source = source
        self.model_facts = model_facts
        self.tokens: TokenTable | None = None

    @property
    def layers(self) -> list[str]:
        return list(self._empty)

    @property
    def domains(self) -> list[str]:
        self._update()
        return [domain for domain in self._parts if domain is not None]

    def statistics(self, layer: str, domain: str | None = None) -> LayerStatistics:
        """The sums of one layer, over the tokens of `domain`, or over all tokens.

        Raises:
            ValueError: If the trace has no such layer or domain.
        """
        self._update()
        if layer not in self._empty:
            raise ValueError(f"the trace has no layer {layer!r}. Its layers: {', '.join(self._empty)}.")
        if domain is not None and domain not in self._parts:
            raise ValueError(f"the trace has no domain {domain!r}. Its domains: {', '.join(self.domains) or 'none'}.")
        parts = self._parts.values() if domain is None else [self._parts[domain]]
        found = [part[layer] for part in parts if layer in part]
        return reduce(add, found) if found else self._empty[layer]

    def metrics(self, domain: str | None = None) -> dict[str, float]:
        """Metrics of balance by name, NaN where they are not known.

        For each of `load_cv`, `max_violation`, `load_entropy`, `router_entropy`, `margin`, `empty_share` and
        `drop_share`: `METRIC/mean` and `METRIC/worst` over the layers that know it, and `METRIC/LAYER`.
        `dead_experts/total` and `dead_experts/LAYER`, and `tokens`, the largest count of a layer.
        The definitions are those of `LayerStatistics`.

        Raises:
            ValueError: If the trace has no such domain.
        """
        layers = {name: self.statistics(name, domain) for name in self.layers}
        found: dict[str, float] = {"tokens": float(max(each.tokens for each in layers.values()))}
        for metric, worst in _WORST.items():
            values = {name: float(getattr(each, metric)) for name, each in layers.items()}
            known = [value for value in values.values() if not math.isnan(value)]
            found[f"{metric}/mean"] = sum(known) / len(known) if known else math.nan
            found[f"{metric}/worst"] = worst(known) if known else math.nan
            found |= {f"{metric}/{name}": value for name, value in values.items()}
        dead = {name: math.nan if not each.tokens else len(each.dead_experts) for name, each in layers.items()}
        found["dead_experts/total"] = float(sum(count for count in dead.values() if not math.isnan(count)))
        return found | {f"dead_experts/{name}": float(count) for name, count in dead.items()}

    def health(self) -> Health:
        """The verdict of `diagnose` on every layer, over the tokens of all domains."""
        return diagnose([self.statistics(name) for name in self.layers])

    def to_pandas(self) -> "pandas.DataFrame":
        """One row a layer and expert, and, where domains were given, one more for each domain.

        Columns: `layer`, `expert`, `domain` (None: all tokens), `count`, `share` (of the layer's assignments),
        `weight_mass`, `weight_share`, `tokens` (of the layer and domain), `is_dead`.

        Raises:
            ImportError: Without pandas.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(f"to_pandas needs pandas. Install it with: {install_command('recipes')}") from error
        frames = []
        for domain in (None, *self.domains):
            for name in self.layers:
                layer = self.statistics(name, domain)
                mass = layer.weight_mass
                frames.append(
                    pandas.DataFrame(
                        {
                            "layer": name,
                            "expert": range(layer.num_experts),
                            "domain": domain,
                            "count": layer.counts.numpy(),
                            "share": layer.load.numpy(),
                            "weight_mass": mass.numpy(),
                            "weight_share": (mass / mass.sum() if mass.any() else torch.zeros_like(mass)).numpy(),
                            "tokens": layer.tokens,
                            "is_dead": (layer.counts == 0).numpy(),
                        }
                    )
                )
        return pandas.concat(frames, ignore_index=True)

    @contextmanager
    def domain(self, name: str, token_texts: Sequence[Sequence[str]] | None = None) -> Iterator[None]:
        """Count what runs inside the block under this domain (a subject, a language, a label); blocks may nest.

        Args:
            token_texts: For the one forward in the block the text of each token: a list for each row, padding left
                out. Kept in tokens mode, unless it is an audit.

        Raises:
            ValueError: If the name is no text.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"a domain must have a name, got {name!r}.")
        before = self._domain, self._token_texts
        self._domain, self._token_texts = name, token_texts
        try:
            yield
        finally:
            self._domain, self._token_texts = before

    @property
    def current_domain(self) -> str | None:
        return self._domain

    @property
    def current_token_texts(self) -> Sequence[Sequence[str]] | None:
        return self._token_texts

    def reduce(self) -> None:
        """Add up the sums of all processes of the default process group, in each of them; every process must call it.

        Each process must have seen tokens of its own (data parallelism). Tokens stay with the process that saw them.

        Raises:
            RuntimeError: If the recording still runs, or the trace has been reduced before.
        """
        if self.source is not None:
            raise RuntimeError("reduce() must be called after the recording has ended: outside of the with block.")
        if self._is_reduced:
            raise RuntimeError("the trace has been reduced before: a second time would count every process twice.")
        self._is_reduced = True
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        # objects: processes may have seen different domains, and the sums are small
        gathered: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, self._parts)
        self._parts = {}
        for parts in gathered:
            for domain, layers in parts.items():
                self.add(list(layers.values()), domain)

    def add(self, statistics: Sequence[LayerStatistics], domain: str | None = None) -> None:
        """Add the sums of other tokens.

        Raises:
            ValueError: If one is of a layer that the trace does not have, or that differs in experts or top-k.
        """
        for each in statistics:
            if each.name not in self._empty:
                raise ValueError(f"the trace has no layer {each.name!r}. Its layers: {', '.join(self._empty)}.")
            _ = self._empty[each.name] + each  # raises if the two do not fit together
        part = self._parts.setdefault(domain, {})
        for each in statistics:
            part[each.name] = part[each.name] + each if each.name in part else each

    def part(self, layer: str, domain: str | None) -> LayerStatistics:
        """The sums of one layer over the tokens of `domain`, or, if it is None, outside of every domain."""
        self._update()
        return self._parts.get(domain, {}).get(layer, self._empty[layer])

    def save(self, folder: str | Path) -> None:
        """Write the trace into `folder`, which is replaced as a whole if it holds a trace or nothing.

        Raises:
            FileExistsError: If the folder holds something else.
        """
        self._update()
        parts = {domain: [self.part(name, domain) for name in self.layers] for domain in self._parts}
        save_trace(StoredTrace(list(self._empty.values()), parts, self.model_facts, self.tokens), Path(folder))

    def report(self, path: str | Path, title: str | None = None) -> None:
        """Write one HTML page about the trace, which needs no other file.

        Args:
            title: The model's name; its class if not given.

        Raises:
            ImportError: Without jinja2.
        """
        from hf_moe.observability.report.from_trace import report_data
        from hf_moe.observability.report.page import write_report

        write_report(Path(path), report_data(self, title))

    @staticmethod
    def load(folder: str | Path) -> "RoutingTrace":
        """Read what `save` wrote. Nothing in it is trusted.

        Raises:
            FileNotFoundError: If there is no trace.
            ValueError: If a file is damaged or of an unknown format.
        """
        stored = load_trace(Path(folder))
        trace = RoutingTrace(stored.empty, stored.model_facts)
        for domain, statistics in stored.parts.items():
            trace.add(statistics, domain)
        trace.tokens = stored.tokens
        return trace

    def end_recording(self) -> None:
        """Take the last sums of `source` and let go of it."""
        self._update()
        self.source = None

    def _update(self) -> None:
        if self.source is not None:
            for domain, statistics in self.source().items():
                self.add(statistics, domain)
