"""Make a model route as recorded: the same experts in training as in inference, or after quantisation."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.unseen_experts import required_layers
from hf_moe.layers.watch_routing import ModelCall, Routing, watch_routing
from hf_moe.observability.layer_sums import ScoreRule
from hf_moe.observability.routing_trace import RoutingTrace
from hf_moe.observability.token_recording import TokenRows
from hf_moe.observability.token_table import TokenRow

Weights = Literal["recomputed", "recorded"]
Unrecorded = Literal["refuse", "own"]
_LENGTHS_KEPT = 8


@contextmanager
def replay_routing(
    model: nn.Module,
    recorded: RoutingTrace | Iterable[TokenRow],
    *,
    weights: Weights = "recomputed",
    unrecorded: Unrecorded = "refuse",
) -> Iterator[None]:
    """While the block runs, every token goes to the experts that were recorded for it.

        with record_routing(rollout_model, "tokens") as trace:
            rollout_model.generate(**prompts)
        with replay_routing(policy, trace, unrecorded="own"):
            loss = policy(**batch).loss

    Tokens are found by the sequence that they end, padding left out: batches may be put together differently, rows may
    be shorter than the recorded ones. The choice is forced where the experts are called, so it works on any family,
    backend and wrapper, in `generate`, and in the second forward of gradient checkpointing (call `backward` before the
    next forward then). What routers return, and with it balancing losses, stays their own. All recorded rows are held
    in memory.

    Args:
        recorded: A trace with tokens, or rows of its table (`trace.tokens.rows()`). Of rows with the same tokens the
            first counts.
        weights: "recomputed": the router's own weights where it chooses the same experts, else the weights that its
            scores give to the recorded ones, with the gradient to the router (routing replay in RL: R2, R3). They are
            shared out among the recorded experts if the router normalises, also after drops over capacity. "recorded":
            the weights of the recording, in float16, without gradient.
        unrecorded: What happens to tokens after the end of a recorded row, such as the last token that `generate`
            returns: "refuse" them, or let the router route them on its "own".

    Raises:
        ValueError: If the trace holds no tokens or other layers than the model. From inside a forward: if a sequence
            was not recorded (naming row and position), a router's scores are not recognised, or the experts choose
            their tokens or are split over processes.
    """
    for name, value, known in (("weights", weights, Weights), ("unrecorded", unrecorded, Unrecorded)):
        if value not in known.__args__:  # type: ignore[attr-defined]
            raise ValueError(f"{name} must be one of {known.__args__}, got {value!r}.")  # type: ignore[attr-defined]
    layers = required_layers(model)
    if isinstance(recorded, RoutingTrace):
        _check_layers(recorded, layers)
        if recorded.tokens is None:
            raise ValueError("the trace holds no tokens to replay. Record with detail='tokens', and end its block.")
        recorded = recorded.tokens.rows()
    replay = _Replay(RecordedRows(recorded), layers, weights, unrecorded)
    with watch_routing(model, torch.compiler.disable(replay.decide), layers=layers):
        yield


@dataclass(frozen=True)
class _Span:
    """Place of one row's tokens of a call in a recorded row: its tokens [begin, begin + count)."""

    source: TokenRow
    begin: int
    count: int


@dataclass(frozen=True)
class _Plan:
    """For one call of the model: places in the batch `[N]` of its tokens by row, and where they were recorded."""

    call: ModelCall
    places: list[np.ndarray]
    spans: list[_Span]

    def gather(self, field: str, layer: str, values_TK: np.ndarray) -> tuple[Tensor, Tensor]:
        """`[T, K]` of what was recorded, put into `values_TK`, and `[T]` bool: where something was."""
        known_T = np.zeros(len(values_TK), bool)
        for places, span in zip(self.places, self.spans, strict=True):
            values = getattr(span.source, field)[layer][span.begin : span.begin + span.count]
            values_TK[places[: len(values)]] = values
            known_T[places[: len(values)]] = True
        return torch.from_numpy(values_TK), torch.from_numpy(known_T)


class _Replay:
    def __init__(self, recorded: "RecordedRows", layers: list[MoeLayer], weights: Weights, unrecorded: Unrecorded):
        self._recorded = recorded
        self._recorded_weights = weights == "recorded"
        self._may_miss = unrecorded == "own"
        self._rules = {layer.name: ScoreRule() for layer in layers}
        self._rows = TokenRows()
        self._tokens: list[np.ndarray] = []
        self._plan: _Plan | None = None
        # the one whose second forward gradient checkpointing will ask for
        self._plan_with_grad: _Plan | None = None
        self._calls_with_grad = 0

    def decide(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Ids and weights for the experts, `[T, K]`."""
        plan = self._plan_again() if routing.is_recomputation else self._plan_for(routing)
        layer, size = routing.layer, len(routing.index)
        if plan.call.shape is None or size != plan.call.shape[0] * plan.call.shape[1]:
            raise ValueError(
                f"layer {layer.name!r} routes {size} rows, not the tokens of the call {plan.call.shape} one by one: "
                "its routing cannot be replayed."
            )
        device, top_k = routing.index.device, routing.index.shape[-1]
        ids_TK, known_T = plan.gather("experts", layer.plain_name, np.zeros((size, top_k), np.int64))
        ids_TK, known_T = ids_TK.to(device), known_T.to(device)
        if self._recorded_weights:
            weights_TK, _ = plan.gather("weights", layer.plain_name, np.zeros((size, top_k), np.float32))
            new_TK = weights_TK.to(device)
            is_new_T = known_T
        else:
            is_same_T = (ids_TK == routing.index.clamp(max=layer.num_experts)).all(-1)
            is_new_T = known_T & ~is_same_T
            new_TK = self._recomputed(routing, ids_TK, is_new_T)
        return (
            torch.where(is_new_T[:, None], ids_TK, routing.index),
            torch.where(is_new_T[:, None], new_TK.to(routing.weights.dtype), routing.weights),
        )

    def _recomputed(self, routing: Routing, ids_TK: Tensor, is_new_T: Tensor) -> Tensor:
        rule = self._rules[routing.layer.name].of(routing)
        if rule is None or routing.logits is None:
            if bool(is_new_T.any()):
                raise ValueError(
                    f"how the router of layer {routing.layer.name!r} turns logits into weights is not recognised: "
                    "weights cannot be recomputed for other experts. Replay with weights='recorded'."
                )
            return routing.weights
        unscored = routing.logits.shape[-1]
        return rule.weights(routing.logits, ids_TK.masked_fill(ids_TK >= routing.layer.num_experts, unscored))

    def _plan_for(self, routing: Routing) -> _Plan:
        call = routing.call
        if call is None or call.input_ids is None:
            raise ValueError("replay needs to know the tokens: call the model with input_ids.")
        if self._plan is None or self._plan.call is not call:
            self._plan = self._find(call, call.input_ids)
            if call.has_grad:
                self._plan_with_grad = self._plan
                self._calls_with_grad += 1
        return self._plan

    def _plan_again(self) -> _Plan:
        """For the second forward of gradient checkpointing."""
        if self._plan_with_grad is None or self._calls_with_grad > 1:
            raise ValueError(
                f"gradient checkpointing runs a forward again after {self._calls_with_grad} calls of the model: which "
                "one is not known. Call backward before the next forward, inside the same replay_routing."
            )
        self._calls_with_grad = 0
        return self._plan_with_grad

    def _find(self, call: ModelCall, input_ids: Tensor) -> _Plan:
        ids_BS = input_ids.cpu().numpy().astype(np.int64)
        mask = call.token_mask(ids_BS.size)
        mask_BS = np.ones(ids_BS.shape, bool) if mask is None else mask.view(input_ids.shape).cpu().numpy()
        if not self._rows.continues(call):
            self._rows.begin(len(ids_BS), None, 0)
            self._tokens = [np.zeros(0, np.int64)] * len(ids_BS)
        self._rows.extend(ids_BS, mask_BS, call)
        begins = [len(tokens) for tokens in self._tokens]
        self._tokens = [
            np.concatenate([before, ids[mask]])
            for before, ids, mask in zip(self._tokens, ids_BS, mask_BS, strict=True)
        ]
        spans = [self._span(number, begin) for number, begin in enumerate(begins)]
        starts = range(0, mask_BS.size, mask_BS.shape[1])
        places = [start + np.flatnonzero(mask) for start, mask in zip(starts, mask_BS, strict=True)]
        return _Plan(call, places, spans)

    def _span(self, number: int, begin: int) -> _Span:
        tokens = self._tokens[number]
        found = self._recorded.find(tokens)
        if found is None or (found[1] < len(tokens) and not self._may_miss):
            reason = self._recorded.closest(tokens)
            hint = "" if found is None else " Pass unrecorded='own' to let the router route what comes after a row."
            raise ValueError(f"row {number} of the call, {len(tokens)} tokens, was not recorded: {reason}.{hint}")
        source, agreed = found
        return _Span(source, begin, max(agreed - begin, 0))


def _check_layers(trace: RoutingTrace, layers: list[MoeLayer]) -> None:
    recorded = [trace.statistics(name) for name in trace.layers]
    wanted = [(each.name, each.num_experts, each.top_k) for each in recorded]
    own = [(layer.plain_name, layer.num_experts, layer.top_k) for layer in layers]
    if wanted != own:
        differing = next(
            (f"{one} and {other}" for one, other in zip(wanted, own, strict=False) if one != other),
            f"{len(wanted)} and {len(own)} layers",
        )
        raise ValueError(
            "the trace must have the layers of the model, with the same names, experts and top-k (in this order); "
            f"trace and model differ: {differing}."
        )


class RecordedRows:
    """Recorded rows in memory, found by their first tokens. The first of several alike counts."""

    def __init__(self, rows: Iterable[TokenRow]):
        """
        Raises:
            ValueError: If there is no row, or the rows come from an audit and hold no token ids.
        """
        self.rows = list(rows)
        if not self.rows:
            raise ValueError("there is no recorded row to replay. Record with detail='tokens'.")
        self._ids: list[np.ndarray] = []
        for row in self.rows:
            if row.token_ids is None:
                raise ValueError("an audit holds no token ids to replay by. Record without audit=True.")
            self._ids.append(row.token_ids.astype(np.int64))
        self._tables: dict[tuple[int, bool], dict[bytes, int]] = {}
        self._lengths = sorted({len(ids) for ids in self._ids}, reverse=True)

    def find(self, tokens: np.ndarray) -> tuple[TokenRow, int] | None:
        """The row that begins with `tokens`, else the longest row with which `tokens` begin; and how many tokens of
        both agree. None if there is neither.

        Args:
            tokens: `[S]` int64.
        """
        found = self._table(len(tokens), exact=False).get(tokens.tobytes())
        if found is not None:
            return self.rows[found], len(tokens)
        for length in (each for each in self._lengths if 0 < each < len(tokens)):
            found = self._table(length, exact=True).get(tokens[:length].tobytes())
            if found is not None:
                return self.rows[found], length
        return None

    def closest(self, tokens: np.ndarray) -> str:
        """Describe the place at which `tokens` part from the recorded row that agrees longest."""
        agreed = [_agreed(ids, tokens) for ids in self._ids]
        best = int(np.argmax(agreed))
        place, ids = agreed[best], self._ids[best]
        recorded = f"token {ids[place]}" if place < len(ids) else "no further token"
        got = f"token {tokens[place]}" if place < len(tokens) else "no further token"
        return f"recorded row {self.rows[best].row} is closest: at position {place} it has {recorded}, the model {got}"

    def _table(self, length: int, *, exact: bool) -> dict[bytes, int]:
        """Rows by their first `length` tokens, those of exactly this length or of at least it."""
        if (length, exact) not in self._tables:
            while len(self._tables) >= _LENGTHS_KEPT:
                self._tables.pop(next(iter(self._tables)))
            table: dict[bytes, int] = {}
            for index, ids in enumerate(self._ids):
                if len(ids) == length or (not exact and len(ids) > length):
                    table.setdefault(ids[:length].tobytes(), index)
            self._tables[length, exact] = table
        return self._tables[length, exact]


def _agreed(one: np.ndarray, other: np.ndarray) -> int:
    shared = min(len(one), len(other))
    differs = np.flatnonzero(one[:shared] != other[:shared])
    return int(differs[0]) if len(differs) else shared
