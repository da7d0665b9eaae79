"""Measure the experts that a domain uses, as ESFT does, and select them.

Source: Wang et al. 2024, "Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning" (arXiv:2407.01906).

Shape suffixes: B rows of a batch, S positions, T = B * S tokens, K slots per token, E experts.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_moe.adapters.expert_selection import METHODS, ExpertSelection, LayerSelection, check_budget, listed
from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.unseen_experts import required_layers
from hf_moe.layers.watch_routing import Routing, watch_routing

logger = logging.getLogger(__name__)


def select_experts(
    model: nn.Module,
    dataset: Iterable[Any],
    tokenizer: Any = None,
    *,
    method: str = "gate",
    budget: float = 0.2,
    max_tokens: int = 131_072,
    max_length: int = 4096,
    batch_size: int = 4,
    progress: bool = True,
) -> ExpertSelection:
    """Measure which experts a domain uses, and choose the fewest that carry `budget` of each layer's score.

    The score of an expert is the paper's: for each row the mean over its tokens, then the mean over the rows (a short
    row counts as much as a long one). Scores are divided by their sum over the experts of the layer; the chosen ones
    are the smallest set whose scores add up to at least `budget`. What is scored are the weights and ids that the
    experts really get, so that biased, grouped and top-p routing count as they are. The model runs without gradients
    in eval mode, and is left in the mode it was in.

    Args:
        model: Any model with MoE layers; run as it is, with the adapters that are active.
        dataset: Rows, of any mix: texts, `{"text": ...}`, token ids (a list or 1-D tensor), or `{"input_ids": ...}`
            with an optional `attention_mask` (1-D; tokens with 0 are padding and do not count).
        tokenizer: For texts.
        method: `gate`: the mean routing weight (the paper's ESFT-Gate); `frequency`: the share of the slots that an
            expert gets (ESFT-Token).
        budget: The paper's threshold p, in (0, 1]: share of the score mass, not of the experts or parameters. The
            paper takes 0.2 for its gate scores and 0.1 for its token scores.
        max_tokens: Tokens to measure, at most; 131,072 is the paper's 32 rows of 4,096.
        max_length: Longer rows are cut.
        progress: Show a progress bar.

    Raises:
        ValueError: If an argument is out of range, the dataset has no token, or the model has no MoE layer.
        TypeError: For a row of another kind, or experts that do not get each token once (expert choice).
    """
    if method not in METHODS:
        raise ValueError(f"method must be 'gate' or 'frequency', got {method!r}.")
    check_budget(budget)
    for name, value in (("max_tokens", max_tokens), ("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    layers = required_layers(model)
    scores = _Scores(layers, method)
    rows = list(_cut(_rows(dataset, tokenizer, max_length), max_tokens))
    _measure(model, scores, rows, batch_size, progress)
    chosen = {
        layer.plain_name: LayerSelection(
            layer.num_experts, layer.num_expert_parameters, _smallest_set(share_E, budget), tuple(share_E)
        )
        for layer, share_E in zip(layers, scores.shares(), strict=True)
    }
    return ExpertSelection(method, budget, scores.num_tokens, chosen)


def _smallest_set(share_E: Sequence[float], budget: float) -> tuple[int, ...]:
    """Ids of the best experts that reach `budget` together; of equal scores the lower id."""
    chosen: list[int] = []
    mass = 0.0
    for expert in sorted(range(len(share_E)), key=lambda expert: (-share_E[expert], expert)):
        # shares add up to 1 within rounding: experts without a score are never needed
        if mass >= budget - 1e-9:
            break
        chosen.append(expert)
        mass += share_E[expert]
    return tuple(sorted(chosen))


class _Scores:
    """Sums the score of every expert while the model runs."""

    def __init__(self, layers: Sequence[MoeLayer], method: str) -> None:
        self.layers, self.method = layers, method
        self.sums = {layer.name: torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers}
        self.num_rows = self.num_tokens = 0
        self._weight_T = torch.empty(0)

    def begin(self, mask_BS: Tensor) -> None:
        """Announce the batch: a token counts `1 / tokens of its row`, padding 0."""
        length_B1 = mask_BS.sum(1, keepdim=True)
        self._weight_T = (mask_BS.double() / length_B1).flatten()
        self.num_rows += len(mask_BS)
        self.num_tokens += int(length_B1.sum())

    def add(self, routing: Routing) -> None:
        """Take the decision of one layer."""
        layer, index_TK = routing.layer, routing.index
        repacks = getattr(layer.experts.config, "routing", None) == "expert_choice"
        if repacks or len(index_TK) != len(self._weight_T):
            raise TypeError(
                f"the experts of {layer.name!r} get ids of shape {tuple(index_TK.shape)} for "
                f"{len(self._weight_T)} tokens: a block that repacks tokens (expert choice) cannot be measured."
            )
        weights_TK = torch.ones_like(routing.weights) if self.method == "frequency" else routing.weights
        score_TK = weights_TK.detach().cpu().double() * self._weight_T[:, None]
        sum_E = self.sums[layer.name]
        # the id num_experts marks a slot without an expert
        summed = torch.bincount(index_TK.cpu().flatten().long(), score_TK.flatten(), minlength=len(sum_E) + 1)
        sum_E += summed[: len(sum_E)]

    def shares(self) -> list[list[float]]:
        """Per layer the scores of the experts divided by their sum; nothing for a layer that no token reached."""
        if not self.num_tokens:
            raise ValueError("the dataset has no token: pass texts or token ids of the domain.")
        for name, sum_E in self.sums.items():
            if not (torch.isfinite(sum_E).all() and (sum_E >= 0).all()):
                raise ValueError(f"routing weights of {name!r} are negative or not finite: {sum_E.tolist()}.")
            if not sum_E.any():
                logger.warning("no token of the dataset reached the experts of %r: none is chosen.", name)
        return [(sum_E / sum_E.sum()).tolist() if sum_E.any() else [] for sum_E in self.sums.values()]


@torch.no_grad()
def _measure(
    model: nn.Module,
    scores: _Scores,
    rows: Sequence[tuple[Tensor, Tensor]],
    batch_size: int,
    progress: bool,
) -> None:
    was_training = [module for module in model.modules() if module.training]
    body = _without_head(model, scores.layers)
    device = next(model.parameters()).device
    total = sum(int(mask_S.sum()) for _, mask_S in rows)
    bar = tqdm(total=total, disable=not progress, unit="token", desc="scoring experts")
    model.eval()
    try:
        with bar, watch_routing(model, scores.add):
            for begin in range(0, len(rows), batch_size):
                batch = zip(*rows[begin : begin + batch_size], strict=True)
                ids_BS, mask_BS = (nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in batch)
                scores.begin(mask_BS)
                body(input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False)
                bar.update(int(mask_BS.sum()))
    finally:
        for module in was_training:
            module.training = True


def _without_head(model: nn.Module, layers: Sequence[MoeLayer]) -> Any:
    """The decoder, whose output costs little memory; the whole model where MoE layers lie outside of the decoder."""
    find: Any = getattr(model, "get_decoder", lambda: model)
    decoder = find()
    inside = {id(module) for module in decoder.modules()}
    return decoder if all(id(layer.experts) in inside for layer in layers) else model


def _cut(rows: Iterator[tuple[Tensor, Tensor]], max_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows until `max_tokens` tokens without padding are reached, the last one cut."""
    left = max_tokens
    for ids_S, mask_S in rows:
        seen_S = mask_S.cumsum(0)
        if int(seen_S[-1]) > left:
            end = int(torch.searchsorted(seen_S, left)) + 1
            ids_S, mask_S = ids_S[:end], mask_S[:end]
        left -= int(mask_S.sum())
        yield ids_S, mask_S
        if not left:
            return


def _rows(dataset: Iterable[Any], tokenizer: Any, max_length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids and mask of each row, int64 of shape (length,); rows without a token are left out."""
    if isinstance(dataset, (str, bytes, Mapping)):
        raise TypeError(
            f"dataset must be an iterable of rows, got one {type(dataset).__name__}. Pass a list of texts."
        )
    for number, row in enumerate(dataset):
        ids, mask = _tokens(row, tokenizer, number)
        ids_S = torch.as_tensor(ids)
        if ids_S.numel() == 0:
            continue
        if ids_S.dim() != 1 or ids_S.is_floating_point():
            raise TypeError(f"token ids of row {number} must be integers in one dimension, got {tuple(ids_S.shape)}.")
        mask_S = torch.ones_like(ids_S) if mask is None else torch.as_tensor(mask)
        if mask_S.shape != ids_S.shape:
            raise ValueError(
                f"attention_mask of row {number} must have one value for each of {len(ids_S)} tokens, got "
                f"{tuple(mask_S.shape)}."
            )
        ids_S, mask_S = ids_S[:max_length].cpu().long(), mask_S[:max_length].cpu().bool().long()
        if mask_S.any():
            yield ids_S, mask_S


def _tokens(row: Any, tokenizer: Any, number: int) -> tuple[Any, Any]:
    """Token ids of a row, and its mask if it has one."""
    if isinstance(row, Mapping):
        if "input_ids" in row:
            return row["input_ids"], row.get("attention_mask")
        if "text" not in row:
            raise TypeError(f"row {number} must have 'input_ids' or 'text', got {listed(row)}.")
        row = row["text"]
    if isinstance(row, str):
        if tokenizer is None:
            raise ValueError("the dataset has texts: pass the model's tokenizer.")
        # cut to max_length later: no warning of the model's length
        return tokenizer(row, verbose=False)["input_ids"], None
    if isinstance(row, (Tensor, list, tuple)):
        return row, None
    raise TypeError(f"row {number} must be a text, token ids or a mapping, got {type(row).__name__}.")
