"""Which experts does a domain use? The measurement of ESFT, and the plain record of what it chose.

Source: Wang et al. 2024, "Let the Expert Stick to His Last: Expert-Specialized Fine-Tuning" (arXiv:2407.01906).

Shape suffixes: B rows of a batch, S positions, T = B * S tokens, K slots per token, E experts.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe.models.moe_layers import MoeLayer, moe_layers

logger = logging.getLogger(__name__)

METHODS = ("gate", "frequency")
GIVEN = "given"  # chosen by hand: no scores
_FORMAT = 1
_MAX_FILE_BYTES = 64 * 2**20  # 1,000 layers of 1,000 experts take less


@dataclass(frozen=True)
class LayerSelection:
    """The experts chosen in one MoE layer.

    Attributes:
        num_experts: Experts of the layer.
        expert_parameters: Parameters of one expert, biases included.
        experts: Ids of the chosen experts, ascending; may be empty.
        scores: Share of the layer's score that each expert has, `num_experts` values that add up to 1; empty if the
            experts were chosen by hand, or if no token reached the layer (text in a layer of vision experts).
    """

    num_experts: int
    expert_parameters: int
    experts: tuple[int, ...]
    scores: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if sorted(set(self.experts)) != list(self.experts):
            raise ValueError(f"expert ids must ascend without repetition, got {self.experts!s:.200}.")
        if self.experts and not 0 <= self.experts[0] <= self.experts[-1] < self.num_experts:
            raise ValueError(f"expert ids must lie in [0, {self.num_experts - 1}], got {self.experts!s:.200}.")
        if self.scores and len(self.scores) != self.num_experts:
            raise ValueError(f"scores must be {self.num_experts} values, one for each expert, got {len(self.scores)}.")
        if not all(math.isfinite(score) and score >= 0 for score in self.scores):
            raise ValueError("scores must be finite and at least 0.")


@dataclass(frozen=True)
class ExpertSelection:
    """The experts to adapt, by the name of the MoE layer (as `moe_layers` names it in the model without wrappers).

    Attributes:
        method: `gate` or `frequency`, as in `select_experts`; `given` if the experts were chosen by hand.
        budget: The share of each layer's score that the chosen experts reach.
        num_tokens: Tokens that were measured.
    """

    method: str
    budget: float
    num_tokens: int
    layers: Mapping[str, LayerSelection]

    def __post_init__(self) -> None:
        if self.method not in (*METHODS, GIVEN):
            raise ValueError(f"method must be one of {', '.join((*METHODS, GIVEN))}, got {self.method!r:.80}.")
        _check_budget(self.budget)
        if self.num_tokens < 0:
            raise ValueError(f"num_tokens must be at least 0, got {self.num_tokens}.")
        if not self.layers:
            raise ValueError("an expert selection needs at least one layer.")

    @classmethod
    def from_experts(cls, model: nn.Module, experts: Mapping[str, Iterable[int]]) -> "ExpertSelection":
        """Experts chosen by hand: ids by the layer's name; layers left out keep all their experts frozen.

        Raises:
            ValueError: For a layer that `model` lacks, or an id out of range.
        """
        found = {layer.plain_name: layer for layer in moe_layers(model)}
        if unknown := sorted(set(experts) - set(found)):
            raise ValueError(f"the model has no MoE layer {unknown[0]!r:.80}. It has {_some(found)}.")
        layers = {
            name: LayerSelection(
                layer.num_experts, layer.num_expert_parameters, tuple(sorted(set(experts.get(name, ()))))
            )
            for name, layer in found.items()
        }
        return cls(GIVEN, 1.0, 0, layers)

    @property
    def num_parameters(self) -> int:
        """Parameters of the chosen experts."""
        return sum(len(layer.experts) * layer.expert_parameters for layer in self.layers.values())

    @property
    def share(self) -> float:
        """Parameters of the chosen experts as a share of all routed experts' parameters."""
        return self.num_parameters / sum(layer.num_experts * layer.expert_parameters for layer in self.layers.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON takes; `from_dict` reads them."""
        return {
            "format": _FORMAT,
            "method": self.method,
            "budget": self.budget,
            "num_tokens": self.num_tokens,
            "layers": {name: _listed(asdict(layer)) for name, layer in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, values: Any) -> "ExpertSelection":
        """The selection that `to_dict` gave.

        Raises:
            ValueError: For anything else, naming what is wrong.
        """
        fields = {"format": int, "method": str, "budget": (int, float), "num_tokens": int, "layers": dict}
        _check_fields(values, fields, "an expert selection")
        if values["format"] != _FORMAT:
            raise ValueError(f"format must be {_FORMAT}, got {values['format']}: update hf_moe to read it.")
        layers = {name: _layer_from_dict(name, layer) for name, layer in values["layers"].items()}
        return cls(values["method"], float(values["budget"]), values["num_tokens"], layers)

    def save(self, path: str | Path) -> None:
        """Write the selection as JSON."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "ExpertSelection":
        """Read what `save` wrote.

        Raises:
            ValueError: If the file is no such selection.
            OSError: If it cannot be read.
        """
        if (size := Path(path).stat().st_size) > _MAX_FILE_BYTES:
            raise ValueError(f"{str(path)!r} has {size} bytes; an expert selection has at most {_MAX_FILE_BYTES}.")
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{str(path)!r} is no JSON ({type(error).__name__}).") from error
        try:
            return cls.from_dict(values)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no expert selection: {error}") from error

    def match(self, model: nn.Module) -> list[tuple[MoeLayer, LayerSelection]]:
        """The MoE layers of `model`, each with its selection.

        Raises:
            ValueError: If the selection was made for another architecture.
        """
        found = {layer.plain_name: layer for layer in moe_layers(model)}
        if set(found) != set(self.layers):
            name = min(set(found) ^ set(self.layers))
            where = "the model lacks it" if name in self.layers else "the selection lacks it"
            raise ValueError(
                f"the selection was made for other MoE layers: {name!r:.80} differs ({where}). Use the selection of "
                "this model, or make one with select_experts."
            )
        for name, layer in found.items():
            geometry = (layer.num_experts, layer.num_expert_parameters)
            chosen = self.layers[name]
            if geometry != (chosen.num_experts, chosen.expert_parameters):
                raise ValueError(
                    f"layer {name!r} has {geometry[0]} experts of {geometry[1]} parameters, the selection is for "
                    f"{chosen.num_experts} of {chosen.expert_parameters}. Use the selection of this model."
                )
        return [(layer, self.layers[name]) for name, layer in found.items()]

    def plot(self, path: str | Path) -> None:
        """Draw a heat map as PNG: layers by experts, score as a multiple of the mean, chosen experts marked.

        Raises:
            ImportError: Without matplotlib.
            ValueError: If the selection has no scores.
        """
        _plot(self, Path(path))


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
    _check_budget(budget)
    for name, value in (("max_tokens", max_tokens), ("max_length", max_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    layers = moe_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoE layer. Pass a Mixture-of-Experts model.")
    scores = _Scores(layers, method)
    rows = _cut(_rows(dataset, tokenizer, max_length), max_tokens)
    _measure(model, scores, rows, batch_size, max_tokens if progress else None)
    chosen = {
        layer.plain_name: LayerSelection(
            layer.num_experts, layer.num_expert_parameters, _smallest_set(share_E, budget), tuple(share_E)
        )
        for layer, share_E in zip(layers, scores.shares(), strict=True)
    }
    return ExpertSelection(method, budget, scores.num_tokens, chosen)


def _check_budget(budget: float) -> None:
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1] (a share of each layer's score), got {budget}.")


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


# ---- measuring


class _Scores:
    """Sums the score of every expert while the model runs."""

    def __init__(self, layers: Sequence[MoeLayer], method: str) -> None:
        self.layers, self.method = layers, method
        self.sums = [torch.zeros(layer.num_experts, dtype=torch.float64) for layer in layers]
        self.num_rows = self.num_tokens = 0
        self._weight_T = torch.empty(0)

    def begin(self, mask_BS: Tensor) -> None:
        """Announce the batch: a token counts `1 / tokens of its row`, padding 0."""
        length_B1 = mask_BS.sum(1, keepdim=True)
        self._weight_T = (mask_BS.double() / length_B1).flatten()
        self.num_rows += len(mask_BS)
        self.num_tokens += int(length_B1.sum())

    def add(self, position: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of what the block calls as its experts: `(hidden_states, top_k_index, top_k_weights)`."""
        _, index_TK, weights_TK = (*args, *kwargs.values())[:3]
        config = self.layers[position].experts.config
        repacks = getattr(config, "routing", None) == "expert_choice"
        if repacks or index_TK.dim() != 2 or len(index_TK) != len(self._weight_T):
            raise TypeError(
                f"the experts of {self.layers[position].name!r} get ids of shape {tuple(index_TK.shape)} for "
                f"{len(self._weight_T)} tokens: a block that repacks tokens (expert choice) cannot be measured."
            )
        score_TK = torch.ones_like(weights_TK) if self.method == "frequency" else weights_TK
        score_TK = score_TK.detach().cpu().double() * self._weight_T[:, None]
        num_experts = len(self.sums[position])
        # the id num_experts marks a slot without an expert
        summed = torch.bincount(index_TK.cpu().flatten().long(), score_TK.flatten(), minlength=num_experts + 1)
        self.sums[position] += summed[:num_experts]

    def shares(self) -> list[list[float]]:
        """Per layer the scores of the experts divided by their sum; nothing for a layer that no token reached."""
        if not self.num_tokens:
            raise ValueError("the dataset has no token: pass texts or token ids of the domain.")
        for layer, sum_E in zip(self.layers, self.sums, strict=True):
            if not (torch.isfinite(sum_E).all() and (sum_E >= 0).all()):
                raise ValueError(f"routing weights of {layer.name!r} are negative or not finite: {sum_E.tolist()}.")
            if not sum_E.any():
                logger.warning("no token of the dataset reached the experts of %r: none is chosen.", layer.name)
        return [(sum_E / sum_E.sum()).tolist() if sum_E.any() else [] for sum_E in self.sums]


@torch.no_grad()
def _measure(
    model: nn.Module,
    scores: _Scores,
    rows: Iterator[tuple[Tensor, Tensor]],
    batch_size: int,
    expected_tokens: int | None,
) -> None:
    from tqdm.auto import tqdm

    was_training = [module for module in model.modules() if module.training]
    hooks = []
    bar = tqdm(total=expected_tokens, disable=expected_tokens is None, unit="token", desc="scoring experts")
    model.eval()
    try:
        for position, layer in enumerate(scores.layers):
            experts = model.get_submodule(layer.called_experts_name)
            hooks.append(experts.register_forward_pre_hook(partial(scores.add, position), with_kwargs=True))
        body = _without_head(model, scores.layers)
        device = next(model.parameters()).device
        while batch := list(islice(rows, batch_size)):
            ids_BS, mask_BS = (
                nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*batch, strict=True)
            )
            scores.begin(mask_BS)
            body(input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False)
            bar.update(int(mask_BS.sum()))
    finally:
        bar.close()
        for hook in hooks:
            hook.remove()
        for module in was_training:
            module.training = True


def _without_head(model: nn.Module, layers: Sequence[MoeLayer]) -> Any:
    """The decoder, whose output costs little memory; the whole model where MoE layers lie outside of the decoder."""
    find: Any = getattr(model, "get_decoder", lambda: model)
    decoder = find()
    inside = {id(module) for module in decoder.modules()}
    return decoder if all(id(layer.experts) in inside for layer in layers) else model


# ---- rows


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
            raise TypeError(f"row {number} must have 'input_ids' or 'text', got {_some(row)}.")
        row = row["text"]
    if isinstance(row, str):
        if tokenizer is None:
            raise ValueError("the dataset has texts: pass the model's tokenizer.")
        return tokenizer(row)["input_ids"], None
    if isinstance(row, (Tensor, list, tuple)):
        return row, None
    raise TypeError(f"row {number} must be a text, token ids or a mapping, got {type(row).__name__}.")


# ---- file and plot


def _some(names: Iterable[Any]) -> str:
    listed = [repr(name)[:80] for name in names]
    return ", ".join(listed[:4]) + (", ..." if len(listed) > 4 else "")


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_fields(values: Any, fields: Mapping[str, Any], what: str) -> None:
    """Exactly these fields, of these types; `True` is no number."""
    if not isinstance(values, dict) or set(values) != set(fields):
        got = _some(values) if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"{what} has the fields {', '.join(fields)}, got {got}.")
    for name, kind in fields.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise ValueError(f"{name} of {what} must not be of type {type(values[name]).__name__}.")


def _layer_from_dict(name: str, values: Any) -> LayerSelection:
    what = f"layer {name!r:.80}"
    _check_fields(values, {"num_experts": int, "expert_parameters": int, "experts": list, "scores": list}, what)
    if values["num_experts"] < 1 or values["expert_parameters"] < 1:
        raise ValueError(f"num_experts and expert_parameters of {what} must be at least 1.")
    if not all(type(expert) is int for expert in values["experts"]):
        raise ValueError(f"experts of {what} must be integers.")
    if not all(type(score) in (int, float) for score in values["scores"]):
        raise ValueError(f"scores of {what} must be numbers.")
    try:
        scores = tuple(float(score) for score in values["scores"])
        return LayerSelection(values["num_experts"], values["expert_parameters"], tuple(values["experts"]), scores)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{what}: {error}") from error


def _plot(selection: ExpertSelection, path: Path) -> None:
    if not any(layer.scores for layer in selection.layers.values()):
        raise ValueError("the selection has no scores to draw: its experts were chosen by hand.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib. Install it with: pip install "hf-moe[recipes]"') from error
    layers = list(selection.layers.values())
    width = max(layer.num_experts for layer in layers)
    relative = [
        [score * layer.num_experts for score in layer.scores] + [math.nan] * (width - len(layer.scores))
        for layer in layers
    ]
    figure = Figure(figsize=(min(3 + 0.14 * width, 16), 1.6 + 0.22 * len(layers)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    image = axis.imshow(relative, aspect="auto", cmap="viridis", vmin=0)
    rows = [row for row, layer in enumerate(layers) for _ in layer.experts]
    marked = [expert for layer in layers for expert in layer.experts]
    label = f"chosen ({selection.share:.1%} of parameters)"
    axis.scatter(marked, rows, s=10, color="#e07b28", label=label)
    axis.set(xlabel="expert", ylabel="MoE layer", title=f"{selection.method} score, budget {selection.budget:g}")
    axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12), fontsize=8)
    figure.colorbar(image, ax=axis, label="score / mean score")
    path.parent.mkdir(parents=True, exist_ok=True)
    # no Software tag: the same figures give the same bytes
    figure.savefig(path, format="png", metadata={"Software": None})
