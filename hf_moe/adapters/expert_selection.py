"""The experts chosen for a domain: a value that is checked, written, read, drawn and matched with a model."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_moe.io.installation import install_command
from hf_moe.io.json_files import read_json
from hf_moe.io.whole_files import write_json
from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.unseen_experts import required_layers

METHODS = ("gate", "frequency")
GIVEN = "given"  # chosen by hand: no scores
_FORMAT = 1
_LISTED_IDS = 6
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


@dataclass(frozen=True, repr=False)
class ExpertSelection:
    """The experts to adapt, by the name of the MoE layer (as `moe_layers` names it in the model without wrappers).

    Printed, it is a table: for each layer the experts chosen, of how many, and their share of the routing.

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
        check_budget(self.budget)
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
        found = {layer.plain_name: layer for layer in required_layers(model)}
        if unknown := sorted(set(experts) - set(found)):
            raise ValueError(f"the model has no MoE layer {unknown[0]!r:.80}. It has {listed(found)}.")
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

    def __repr__(self) -> str:
        chosen = sum(len(layer.experts) for layer in self.layers.values())
        experts = sum(layer.num_experts for layer in self.layers.values())
        layers = f"{len(self.layers):,} layer{'s' * (len(self.layers) > 1)}"
        return (
            f"ExpertSelection({self.method}, budget {self.budget:g}, {self.num_tokens:,} tokens): {chosen:,} of "
            f"{experts:,} experts in {layers}, {self.share:.1%} of the experts' parameters"
        )

    def __str__(self) -> str:
        rows = [("layer", "experts", "share of the routing", "ids")]
        rows += [(name, *_row(layer)) for name, layer in self.layers.items()]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ("  ".join(map(str.ljust, row, (*widths, 0))).rstrip() for row in rows)
        return "\n".join([repr(self), *lines])

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON takes; `from_dict` reads them."""
        return {
            "format": _FORMAT,
            "method": self.method,
            "budget": self.budget,
            "num_tokens": self.num_tokens,
            "layers": {name: _lists(asdict(layer)) for name, layer in self.layers.items()},
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
        """Write the selection as JSON; the file is whole or not there."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "ExpertSelection":
        """Read what `save` wrote.

        Raises:
            ValueError: If the file is no such selection.
            OSError: If it cannot be read.
        """
        try:
            return cls.from_dict(read_json(Path(path), largest=_MAX_FILE_BYTES, allow_nan=True))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is no expert selection: {error}") from error

    def match(self, model: nn.Module) -> list[tuple[MoeLayer, LayerSelection]]:
        """The MoE layers of `model`, each with its selection.

        Raises:
            ValueError: If the selection was made for another architecture.
        """
        found = {layer.plain_name: layer for layer in required_layers(model)}
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


def _row(layer: LayerSelection) -> tuple[str, str, str]:
    """Cells of the printed table."""
    share = f"{sum(layer.scores[expert] for expert in layer.experts):.0%}" if layer.scores else "not measured"
    more = f", ... {layer.experts[-1]}" if len(layer.experts) > _LISTED_IDS else ""
    ids = ", ".join(map(str, layer.experts[:_LISTED_IDS])) + more
    return f"{len(layer.experts)} of {layer.num_experts}", share, ids


def check_budget(budget: float) -> None:
    if not 0 < budget <= 1:
        raise ValueError(f"budget must be in (0, 1] (a share of each layer's score), got {budget}.")


def listed(names: Iterable[Any]) -> str:
    """The first few names, for an error."""
    quoted = [repr(name)[:80] for name in names]
    return ", ".join(quoted[:4]) + (", ..." if len(quoted) > 4 else "")


def _lists(values: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _check_fields(values: Any, fields: Mapping[str, Any], what: str) -> None:
    """Exactly these fields, of these types; `True` is no number."""
    if not isinstance(values, dict) or set(values) != set(fields):
        got = listed(values) if isinstance(values, dict) else type(values).__name__
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
        raise ImportError(f"plots need matplotlib. Install it with: {install_command('recipes')}") from error
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
    # no Software tag: the same scores give the same bytes
    figure.savefig(path, format="png", metadata={"Software": None})
