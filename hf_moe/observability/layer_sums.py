"""Add up the decisions of one layer on the model's device, without a synchronisation.

Shape suffixes: T tokens, K slots per token, E experts, X experts that the router scores (null experts included).
"""

import torch
from torch import Tensor

from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.router_scores import RouterScores, recognize_scores
from hf_moe.layers.watch_routing import Routing
from hf_moe.observability.layer_statistics import LayerStatistics

# tokens that are gathered before they are added: decoding one by one would pay for every operation each time
_GATHERED = 256
_ATTEMPTS = 3
_CHECKED_TOKENS = 16
# a wrong rule is off by far more, weights in bfloat16 by less
_TOLERANCE = 0.05


class ScoreRule:
    """The rule that makes a layer's logits weights: recognised once, then checked on a few tokens of each forward."""

    def __init__(self) -> None:
        self._rule: RouterScores | None = None
        self._attempts = _ATTEMPTS
        self._failed: Tensor | None = None

    def of(self, routing: Routing) -> RouterScores | None:
        """The rule, or None as long as none explains the weights."""
        if routing.logits is None or not len(routing.index):
            return None
        if self._rule is None and self._attempts:
            # synchronises, but only in the first forwards
            self._attempts -= 1
            self._rule = recognize_scores(routing.logits, scored_ids(routing), routing.weights)
        if self._rule is not None:
            self._check(self._rule, routing)
        return self._rule

    def confirmed(self) -> RouterScores | None:
        """The rule if it held in all forwards. Synchronises the device."""
        return None if self._failed is not None and bool(self._failed) else self._rule

    def _check(self, rule: RouterScores, routing: Routing) -> None:
        few = slice(_CHECKED_TOKENS)
        assert routing.logits is not None
        weights_TK = routing.weights[few].float()
        expected_TK = rule.weights(routing.logits[few], scored_ids(routing)[few]).float()
        is_off_TK = ((expected_TK - weights_TK).abs() > _TOLERANCE * expected_TK.abs()) & (weights_TK != 0)
        failed = is_off_TK.any()
        self._failed = failed if self._failed is None else self._failed | failed


def scored_ids(routing: Routing) -> Tensor:
    """The ids behind the weights, `[T, K]`: before the capacity dropped any; empty slots lie beyond the logits."""
    index_TK = routing.index if routing.choice is None else routing.choice
    unscored = routing.layer.num_experts if routing.logits is None else routing.logits.shape[-1]
    return index_TK.masked_fill(index_TK >= routing.layer.num_experts, unscored)


class LayerSums:
    """The sums of `LayerStatistics`, growing while the model runs.

    Small batches are gathered first: `flush` adds them, and `read` sees only what was added.
    """

    def __init__(self, layer: MoeLayer, rule: ScoreRule, device: torch.device, *, coactivation: bool = True):
        self._layer = layer
        self._rule = rule
        self._gathered: list[Routing] = []
        self._num_gathered = 0
        # also where the model runs in inference mode: its tensors could not be changed after it
        with torch.inference_mode(False):
            size = layer.num_experts
            exact = torch.float32 if device.type == "mps" else torch.float64
            # the last entry gathers padding and slots without an expert
            self._counts = torch.zeros(size + 1, dtype=torch.int64, device=device)
            self._mass = torch.zeros(size + 1, dtype=exact, device=device)
            self._pairs = torch.zeros(size, size, dtype=torch.int64, device=device) if coactivation else None
            # entropy and margin
            self._scores = torch.zeros(2, dtype=exact, device=device)
            # tokens, tokens with known probabilities, tokens with weights that are not finite, dropped slots
            self._totals = torch.zeros(4, dtype=torch.int64, device=device)
        self._knows_drops = True

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        if routing.index.shape[-1] != self._layer.top_k:
            raise ValueError(
                f"layer {self._layer.name!r} takes {self._layer.top_k} experts per token, its experts were called "
                f"with {routing.index.shape[-1]}. Start the recording after a change of top_k."
            )
        if len(routing.index) >= _GATHERED:
            self._add(routing)
            return
        self._gathered.append(_copy(routing))
        self._num_gathered += len(routing.index)
        if self._num_gathered >= _GATHERED:
            self.flush()

    @torch.no_grad()
    def flush(self) -> None:
        """Add what was gathered."""
        gathered, self._gathered, self._num_gathered = self._gathered, [], 0
        if gathered:
            self._add(_joined(gathered))

    def read(self, is_scored: bool) -> tuple[LayerStatistics, int]:
        """Statistics of what was added, and the count of tokens whose weights are not finite. Synchronises the device.

        Args:
            is_scored: Whether the probabilities that were added can be trusted.
        """
        layer = self._layer
        counts = self._counts.cpu()[: layer.num_experts].clone()
        tokens, scored, not_finite, dropped = self._totals.tolist()
        entropy, margin = self._scores.tolist()
        pairs = None if self._pairs is None else self._pairs.cpu().clone()
        if pairs is not None:
            pairs.diagonal().copy_(counts)  # differs where a token has one expert twice
        statistics = LayerStatistics(
            name=layer.plain_name,
            num_experts=layer.num_experts,
            top_k=layer.top_k,
            tokens=tokens,
            counts=counts,
            weight_mass=self._mass.cpu()[: layer.num_experts].double().clone(),
            empty_slots=tokens * layer.top_k - int(counts.sum()),
            dropped=dropped if self._knows_drops else None,
            scored_tokens=scored if is_scored else 0,
            entropy_sum=max(entropy, 0.0) if is_scored else 0.0,
            margin_sum=max(margin, 0.0) if is_scored else 0.0,
            coactivation=pairs,
        )
        return statistics, not_finite

    def _add(self, routing: Routing) -> None:
        device = routing.index.device
        with torch.autocast(device.type, enabled=False):
            rule = self._rule.of(routing)
            mask_T = routing.index.new_ones(len(routing.index), dtype=torch.bool)
            if routing.mask is not None:
                mask_T = routing.mask.to(device)
            self._add_choice(routing, mask_T)
            self._add_totals(routing, mask_T)
            if rule is not None and routing.logits is not None:
                self._add_scores(rule.probabilities(routing.logits.detach()), mask_T)

    def _add_choice(self, routing: Routing, mask_T: Tensor) -> None:
        num_experts, weights_TK = self._layer.num_experts, routing.weights.detach()
        index_TK = routing.index.clamp(max=num_experts)
        if routing.mask is not None:
            index_TK = index_TK.masked_fill(~mask_T[:, None], num_experts)
        index_N = index_TK.flatten()
        self._counts.scatter_add_(0, index_N, torch.ones_like(index_N, dtype=torch.int64))
        mass_N = weights_TK.flatten().nan_to_num(0.0, 0.0, 0.0).to(self._mass.dtype)
        self._mass.index_add_(0, index_N, mass_N)
        if self._pairs is None:
            return
        chosen_TE = weights_TK.new_zeros(len(index_TK), num_experts + 1, dtype=torch.float32)
        chosen_TE = chosen_TE.scatter_(1, index_TK, 1.0)[:, :num_experts]
        # whole numbers below 2^24: exact in float32
        self._pairs += (chosen_TE.T @ chosen_TE).long()

    def _add_totals(self, routing: Routing, mask_T: Tensor) -> None:
        index_TK, num_experts = routing.index, self._layer.num_experts
        self._totals[0] += mask_T.sum()
        self._totals[2] += (mask_T & ~routing.weights.isfinite().all(-1)).sum()
        if routing.choice is None:
            self._knows_drops = False
        else:
            is_dropped_TK = (routing.choice < num_experts) & (index_TK >= num_experts)
            self._totals[3] += (is_dropped_TK & mask_T[:, None]).sum()

    def _add_scores(self, probabilities_TX: Tensor, mask_T: Tensor) -> None:
        entropy_T, margin_T = _entropy_and_margin(probabilities_TX)
        is_known_T = mask_T & entropy_T.isfinite()
        self._totals[1] += is_known_T.sum()
        for position, values_T in enumerate((entropy_T, margin_T)):
            self._scores[position] += values_T.where(is_known_T, 0.0).sum(dtype=self._scores.dtype)


def _copy(routing: Routing) -> Routing:
    """Copy the tensors, so that the model cannot write over them; the copy always has a mask."""
    index_TK = routing.index.detach().clone()
    mask_T = index_TK.new_ones(len(index_TK), dtype=torch.bool) if routing.mask is None else routing.mask
    return Routing(
        layer=routing.layer,
        logits=None if routing.logits is None else routing.logits.detach().clone(),
        weights=routing.weights.detach().clone(),
        index=index_TK,
        mask=mask_T.to(index_TK.device),
        is_recomputation=routing.is_recomputation,
        choice=None if routing.choice is None else routing.choice.clone(),
    )


def _joined(parts: list[Routing]) -> Routing:
    """Join the tokens of several forwards of one layer."""
    return Routing(
        layer=parts[0].layer,
        logits=_cat([part.logits for part in parts]),
        weights=torch.cat([part.weights for part in parts]),
        index=torch.cat([part.index for part in parts]),
        mask=_cat([part.mask for part in parts]),
        is_recomputation=False,
        choice=_cat([part.choice for part in parts]),
    )


def _cat(tensors: list[Tensor | None]) -> Tensor | None:
    given = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(given) if len(given) == len(tensors) else None


def _entropy_and_margin(probabilities_TX: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy in nats, and the difference between the two largest; `[T]` each."""
    p_TX = probabilities_TX
    entropy_T = -(p_TX * p_TX.clamp_min(torch.finfo(p_TX.dtype).tiny).log()).sum(-1)
    # a maximum, then one without it: four times as fast as topk(2) on a CPU
    first_T1, place_T1 = p_TX.max(-1, keepdim=True)
    second_T = p_TX.scatter(-1, place_T1, 0.0).amax(-1)
    return entropy_T, first_T1[:, 0] - second_T
