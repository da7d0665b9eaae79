"""Record what the routers of a model decide while it runs: in training, evaluation and `generate`, any family.

`record_routing` makes a `RoutingTrace`; `count_expert_load` counts assignments and nothing else.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.unseen_experts import required_layers
from hf_moe.layers.watch_routing import Routing, watch_routing
from hf_moe.observability.explain import explain_layers
from hf_moe.observability.layer_statistics import LayerStatistics, empty_statistics
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
        model: A Mixture-of-Experts model. If it is compiled, start the recording before its first call.
        detail: "counts": sums by layer, expert and domain, kept on the model's device (assignments int64, weights
            float64, float32 on MPS); the forward never waits.
            "tokens": besides these the decision for every token, streamed to a Parquet file in a temporary folder
            (needs pyarrow), which `RoutingTrace.save` copies.
        audit: In tokens mode, store neither ids nor text of the tokens, only a SHA-256 of each row.
        scratch: Where the temporary folder is made; the system's place by default.

    Yields:
        The trace, which may be read while the recording runs. For each layer, domain and all tokens
        `trace.statistics` has `counts` `[E]` int64, `weight_mass` `[E]` float64 and `coactivation` `[E, E]` int64, on
        the CPU. In tokens mode `trace.tokens`, readable after the block, has for each layer `experts` `[N, K]` uint8
        or uint16 and `weights` `[N, K]` float16, N tokens without padding.

    Raises:
        ValueError: If the model has no MoE layer, `detail` is unknown, or `audit` comes with counts. From inside a
            forward, if a layer's top-k has changed; in tokens mode also if the model is called without token ids, a
            layer sees other rows than the tokens, or texts do not fit the tokens.
        TypeError: From inside a forward, as `watch_routing`.
        RuntimeError: At the end of the block, if no token reached a router.
        ImportError: In tokens mode without pyarrow.

    Source: the call of the experts, as `watch_routing` hands it on; the metrics are those of `LayerStatistics`.
    """
    if detail not in ("counts", "tokens"):
        raise ValueError(f"detail must be 'counts' or 'tokens', got {detail!r}.")
    if audit and detail != "tokens":
        raise ValueError("audit=True is for detail='tokens': counts hold neither ids nor text.")
    layers = required_layers(model)
    facts = _model_facts(model, layers, detail, audit)
    sums = _DomainSums(layers, facts)
    trace = RoutingTrace(
        [empty_statistics(each.plain_name, each.num_experts, each.top_k) for each in layers], facts, source=sums.take
    )
    tokens = TokenRecording(layers, audit=audit, scratch=scratch) if detail == "tokens" else None

    def record(routing: Routing) -> None:
        if routing.is_recomputation:
            return
        sums.add(routing, trace.current_domain)
        if tokens is not None:
            tokens.add(routing, trace.current_domain, trace.current_token_texts)

    try:
        # compiled, it would be traced into the graph, and again for each new state
        with watch_routing(model, torch.compiler.disable(record), layers=layers):
            yield trace
        if tokens is not None:
            tokens.end_forward()
    finally:
        trace.end_recording()
        if tokens is not None:
            trace.tokens = tokens.close()
    _require_tokens(trace)
    if sums.not_finite:
        warnings.warn(
            "routing weights are not finite (NaN or infinity) for "
            + ", ".join(f"{count} tokens in {name}" for name, count in sums.not_finite.items())
            + ": these tokens are missing in weight mass, entropy and margin.",
            stacklevel=3,
        )


def _require_tokens(trace: RoutingTrace) -> None:
    if not any(trace.statistics(name).tokens for name in trace.layers):
        raise RuntimeError(
            "no token reached a router while the recording ran. Call the model inside the block; if it is "
            "compiled, start the recording before its first call: a compiled graph leaves out later hooks."
        )


class _DomainSums:
    """Sums by domain and layer on the model's device, with the rules that make each layer's logits weights.

    Attributes:
        not_finite: By the layer's name the count of tokens whose weights were not finite, in the sums taken so far.
    """

    def __init__(self, layers: list[MoeLayer], model_facts: dict[str, Any]):
        """`model_facts`: those of the trace; `take` sets their `router_scores`."""
        self.not_finite: dict[str, int] = {}
        self._model_facts = model_facts
        self._plain_names = {layer.name: layer.plain_name for layer in layers}
        self._sums: dict[str | None, dict[str, LayerSums]] = {}
        self._rules = {layer.name: ScoreRule() for layer in layers}

    def add(self, routing: Routing, domain: str | None) -> None:
        layer = routing.layer
        sums = self._sums.setdefault(domain, {})
        if layer.name not in sums:
            sums[layer.name] = LayerSums(layer, self._rules[layer.name], routing.index.device)
        sums[layer.name].add(routing)

    def take(self) -> dict[str | None, list[LayerStatistics]]:
        """Statistics of what was added since the last call, by domain. Synchronises the device."""
        taken, self._sums = self._sums, {}
        for layers in taken.values():
            for sums in layers.values():
                sums.flush()
        rules = {name: rule.confirmed() for name, rule in self._rules.items()}
        self._model_facts["router_scores"] = {
            self._plain_names[name]: None if rule is None else vars(rule) for name, rule in rules.items()
        }
        return {
            domain: [self._read(sums, is_scored=rules[name] is not None) for name, sums in layers.items()]
            for domain, layers in taken.items()
        }

    def _read(self, sums: LayerSums, *, is_scored: bool) -> LayerStatistics:
        statistics, not_finite = sums.read(is_scored)
        if not_finite:
            self.not_finite[statistics.name] = self.not_finite.get(statistics.name, 0) + not_finite
        return statistics


def _model_facts(model: nn.Module, layers: list[MoeLayer], detail: str, audit: bool) -> dict[str, Any]:
    found = explain_layers(model, layers)
    facts: dict[str, Any] = {
        "model_class": found.model_class,
        "model_type": found.model_type,
        "dtype": found.dtype,
        "parameters": found.total_parameters,
        "active_parameters": found.active_parameters,
        "layers": len(layers),
        "experts": _one_or_all([layer.num_experts for layer in layers]),
        "top_k": _one_or_all([layer.top_k for layer in layers]),
        "router_scores": {layer.plain_name: None for layer in layers},
        "detail": detail,
    }
    if audit:
        facts["audit"] = "the trace stores neither the tokens' ids nor their text, only a SHA-256 of each row"
    return facts


def _one_or_all(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


class ExpertLoad:
    """Assignments (token, expert) counted since the last `clear`, per MoE layer in the model's order."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    @property
    def counts(self) -> dict[str, Tensor]:
        """By the layer's name an int64 tensor of shape (num_experts,); a layer that has not run is absent."""
        return {name: counts[:-1].cpu() for name, counts in self._counts.items()}

    def clear(self) -> None:
        self._counts = {}

    def add(self, routing: Routing) -> None:
        """Count a decision, on the model's device."""
        layer, index = routing.layer, routing.index.detach().clamp(max=routing.layer.num_experts)
        if routing.mask is not None:
            index = index.masked_fill(~routing.mask.to(index.device)[:, None], layer.num_experts)
        # the last entry gathers padding and slots without an expert
        counts = self._counts.get(layer.name, index.new_zeros(layer.num_experts + 1, dtype=torch.int64))
        index_N = index.flatten().long()
        self._counts[layer.name] = counts.scatter_add(0, index_N, torch.ones_like(index_N))


@contextmanager
def count_expert_load(model: nn.Module) -> Iterator[ExpertLoad]:
    """Count the experts that the routers choose while the block runs; `record_routing` records more.

    Padding (a 2-D attention mask), slots without an expert (null experts, dropped tokens) and the recomputation of
    gradient checkpointing are not counted.

    Raises:
        ValueError, TypeError: As `watch_routing`.
    """
    load = ExpertLoad()

    def count(routing: Routing) -> None:
        if not routing.is_recomputation:
            load.add(routing)

    with watch_routing(model, count):
        yield load
