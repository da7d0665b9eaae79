"""Record what the routers of a model decide while it runs: in training, evaluation and `generate`, any family."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.unseen_experts import required_layers
from hf_moe.layers.watch_routing import Routing, watch_routing
from hf_moe.observability.explain import explain
from hf_moe.observability.layer_statistics import empty_statistics
from hf_moe.observability.layer_sums import LayerSums, ScoreRule
from hf_moe.observability.routing_trace import RoutingTrace
from hf_moe.observability.token_recording import TokenRecording

Detail = Literal["counts", "tokens"]


@contextmanager
def record_routing(
    model: nn.Module, detail: Detail = "counts", *, audit: bool = False, scratch: str | Path | None = None
) -> Iterator[RoutingTrace]:
    """While the block runs, record each decision of each router once.

        with record_routing(model) as trace:
            with trace.domain("law"):
                model(**batch)
        print(trace.metrics()["load_cv/worst"])

    Padding (a 2-D attention mask) and the second forward of gradient checkpointing are not counted; in `generate` the
    tokens of the prompt and each new token count once. `model` may be wrapped by PEFT or DDP; each process records its
    own tokens, `RoutingTrace.reduce` adds them up. Layers that see other rows than the tokens of the call (towers for
    images, families that split text from images) count all their rows.

    Args:
        detail: "counts": sums by layer, expert and domain, kept on the model's device; the forward never waits.
            "tokens": besides these the decision for every token, streamed to a Parquet file in a temporary folder
            (needs pyarrow), which `RoutingTrace.save` copies.
        audit: In tokens mode, store neither ids nor text of the tokens, only a SHA-256 of each row.
        scratch: Where the temporary folder is made; the system's place by default.

    Raises:
        ValueError: If the model has no MoE layer, or `detail` is unknown. In tokens mode, from inside a forward, if
            the model is called without token ids, or a layer sees other rows than the tokens.
        RuntimeError: At the end of the block, if no token reached a router.
        ImportError: In tokens mode without pyarrow.
    """
    if detail not in ("counts", "tokens"):
        raise ValueError(f"detail must be 'counts' or 'tokens', got {detail!r}.")
    if audit and detail != "tokens":
        raise ValueError("audit=True is for detail='tokens': counts hold neither ids nor text.")
    layers = required_layers(model)
    trace = _empty_trace(model, layers, detail, audit)
    tokens = TokenRecording(trace, layers, audit=audit, scratch=scratch) if detail == "tokens" else None
    recorder = _Recorder(trace, layers, tokens)
    trace._fetch = recorder.fetch
    try:
        # compiled, it would be traced into the graph, and again for each new state
        with watch_routing(model, torch.compiler.disable(recorder.hear)):
            yield trace
        if tokens is not None:
            tokens.end_forward()
    finally:
        recorder.fetch()
        trace._fetch = None
        if tokens is not None:
            trace.tokens = tokens.close()
    recorder.check()


class _Recorder:
    """Sums by domain and layer, and the rules of the layers' scores."""

    def __init__(self, trace: RoutingTrace, layers: list[MoeLayer], tokens: TokenRecording | None):
        self._trace = trace
        self._tokens = tokens
        self._sums: dict[str | None, dict[str, LayerSums]] = {}
        self._rules = {layer.name: ScoreRule() for layer in layers}
        self._not_finite: dict[str, int] = {}

    def hear(self, routing: Routing) -> None:
        if routing.is_recomputation:
            return
        layer = routing.layer
        domain = self._trace.current_domain
        sums = self._sums.setdefault(domain, {})
        if layer.name not in sums:
            sums[layer.name] = LayerSums(layer, self._rules[layer.name], routing.index.device)
        sums[layer.name].add(routing)
        if self._tokens is not None:
            self._tokens.hear(routing)

    def fetch(self) -> None:
        """Move the sums into the trace."""
        taken, self._sums = self._sums, {}
        for sums in (each for layers in taken.values() for each in layers.values()):
            sums.flush()
        rules = {name: rule.confirmed() for name, rule in self._rules.items()}
        for domain, layers in taken.items():
            read = {name: sums.read(rules[name] is not None) for name, sums in layers.items()}
            self._trace.add([statistics for statistics, _ in read.values()], domain)
            for statistics, not_finite in read.values():
                self._not_finite[statistics.name] = self._not_finite.get(statistics.name, 0) + not_finite
        names = dict(zip(self._rules, self._trace.layers, strict=True))
        self._trace.model_facts["router_scores"] = {
            names[name]: None if rule is None else vars(rule) for name, rule in rules.items()
        }

    def check(self) -> None:
        """What the figures do not show is said."""
        if not any(self._trace.statistics(name).tokens for name in self._trace.layers):
            raise RuntimeError(
                "no token reached a router while the recording ran. Call the model inside the block; if it is "
                "compiled, start the recording before its first call: a compiled graph leaves out later hooks."
            )
        spoilt = {name: count for name, count in self._not_finite.items() if count}
        if spoilt:
            warnings.warn(
                "routing weights are not finite (NaN or infinity) for "
                + ", ".join(f"{count} tokens in {name}" for name, count in spoilt.items())
                + ": these tokens are missing in weight mass, entropy and margin.",
                stacklevel=4,
            )


def _empty_trace(model: nn.Module, layers: list[MoeLayer], detail: str, audit: bool) -> RoutingTrace:
    facts = explain(model)
    known: dict[str, Any] = {
        "model_class": facts.model_class,
        "model_type": facts.model_type,
        "dtype": facts.dtype,
        "parameters": facts.total_parameters,
        "active_parameters": facts.active_parameters,
        "layers": len(layers),
        "experts": _one_or_all([layer.num_experts for layer in layers]),
        "top_k": _one_or_all([layer.top_k for layer in layers]),
        "router_scores": {layer.plain_name: None for layer in layers},
        "detail": detail,
    }
    if audit:
        known["audit"] = "the trace stores neither the tokens' ids nor their text, only a SHA-256 of each row"
    return RoutingTrace([empty_statistics(each.plain_name, each.num_experts, each.top_k) for each in layers], known)


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values
