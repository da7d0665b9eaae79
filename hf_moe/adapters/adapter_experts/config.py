"""Configuration of adapter experts, checked when it is built and when it is attached to a model."""

import difflib
import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import peft
from peft import PeftConfig


class AdapterExpertsType(str, enum.Enum):  # noqa: UP042 (PEFT's own types are such; keys of its tables)
    """The method's key in PEFT's tables and files: PEFT's enum is closed, and compares as strings."""

    ADAPTER_EXPERTS = "ADAPTER_EXPERTS"


@dataclass
class AdapterExpertsConfig(PeftConfig):
    """A few small routed experts beside the experts of every MoE layer, or of some.

    Attributes:
        num_adapter_experts: Adapter experts in each layer.
        adapter_width: Inner width of one adapter expert. Multiples of 8 are the fast ones on GPUs.
        top_k: Adapter experts for each token. Their weights are softmax probabilities over all adapter experts, not
            made to add up to 1 again: with `top_k=1` the weight would then be 1 whatever the gate says, and the gate
            would never get a gradient.
        layers: MoE layers that get adapter experts: positions among the model's MoE layers from 0, or names as
            `hf_moe.moe_layers` gives them. None for all.
        base_layers: Written when the adapter is attached, and saved: the hidden size of every MoE layer of the base,
            by the name of its experts. Another base is then refused.

    Raises:
        ValueError, TypeError: Naming the value and the rule.
        ImportError: If PEFT is too old to save adapters of a method that is not its own.
    """

    num_adapter_experts: int = field(default=2, metadata={"help": "Adapter experts in each MoE layer."})
    adapter_width: int = field(default=64, metadata={"help": "Inner width of one adapter expert."})
    top_k: int = field(default=1, metadata={"help": "Adapter experts for each token."})
    layers: list[int | str] | None = field(
        default=None, metadata={"help": "Positions or names of the MoE layers to adapt; None for all."}
    )
    base_layers: dict[str, int] | None = field(
        default=None, metadata={"help": "Hidden size of each MoE layer of the base; written when attached."}
    )

    def __post_init__(self) -> None:
        _check_peft()
        super().__post_init__()
        self.peft_type = AdapterExpertsType.ADAPTER_EXPERTS
        for name in ("num_adapter_experts", "adapter_width", "top_k"):
            _check_positive(name, getattr(self, name))
        if self.top_k > self.num_adapter_experts:
            raise ValueError(
                f"top_k must be at most num_adapter_experts ({self.num_adapter_experts}), got {self.top_k}."
            )
        if self.layers is not None:
            self.layers = _checked_layers(self.layers)

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Paths of the experts modules to wrap; empty before the adapter is attached. PEFT asks for it."""
        names = tuple(self.base_layers or ())
        if self.layers is None:
            return names
        return tuple(name for name in names if any(_is_meant(layer, name, names) for layer in self.layers))

    def attached_to(self, base_layers: dict[str, int], model: str) -> None:
        """Take the model's layers, after comparing them with what is asked for and what the adapter was made for.

        Args:
            base_layers: As the attribute.
            model: The model's class, for messages.

        Raises:
            ValueError: For a layer that the model lacks, or another base than the adapter's.
        """
        if self.base_layers is not None and self.base_layers != base_layers:
            name = f" {self.base_model_name_or_path!r}" if self.base_model_name_or_path else ""
            raise ValueError(
                f"the adapter was made for a base with {_described(self.base_layers)}; this {model} has "
                f"{_described(base_layers)}. Load the adapter onto its own base{name}."
            )
        for layer in self.layers or ():
            _check_layer(layer, tuple(base_layers), model)
        self.base_layers = base_layers


def _check_peft() -> None:
    # 0.20 writes "Unknown PEFT type" for every type beyond its enum, and only when the trained adapter is saved
    if tuple(int(part) for part in peft.__version__.split(".")[:2]) < (0, 21):
        raise ImportError(
            f"adapter experts need peft 0.21 or newer, this is {peft.__version__}: older versions cannot save them. "
            "Upgrade with: pip install -U peft"
        )


def _check_positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def _checked_layers(layers: object) -> list[int | str]:
    if isinstance(layers, str) or not isinstance(layers, Sequence):
        raise TypeError(f"layers must be a list of positions or names, or None for all MoE layers, got {layers!r}.")
    if not layers:
        raise ValueError("layers must name at least one MoE layer; None adapts all of them.")
    for layer in layers:
        if not isinstance(layer, (int, str)) or isinstance(layer, bool):
            raise TypeError(f"layers must hold integers or names, got {layer!r}.")
        if isinstance(layer, int) and layer < 0:
            raise ValueError(f"layers must count from 0, got {layer}.")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers must name each MoE layer once, got {list(layers)}.")
    return list(layers)


def _is_meant(layer: int | str, name: str, names: tuple[str, ...]) -> bool:
    """Whether `layer` of the config means the experts at `name`: by position, as their block, or as themselves."""
    if isinstance(layer, int):
        return layer < len(names) and names[layer] == name
    return layer in (name, name.rpartition(".")[0])


def _check_layer(layer: int | str, names: tuple[str, ...], model: str) -> None:
    if any(_is_meant(layer, name, names) for name in names):
        return
    if isinstance(layer, int):
        raise ValueError(
            f"layers asks for MoE layer {layer}; {model} has {len(names)} MoE layers, 0 to {len(names) - 1}. "
            "Positions count MoE layers only, not the dense ones between them."
        )
    blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    near = difflib.get_close_matches(layer, blocks, n=3)
    listed = f"Did you mean {', '.join(map(repr, near))}?" if near else f"It has {', '.join(map(repr, blocks))}."
    raise ValueError(f"layers asks for {layer!r}, which is no MoE layer of {model}. {listed}")


def _described(base_layers: dict[str, int]) -> str:
    sizes = ", ".join(map(str, sorted(set(base_layers.values()))))
    names = list(base_layers)
    count = "1 MoE layer" if len(names) == 1 else f"{len(names)} MoE layers"
    span = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return f"{count} of hidden size {sizes} ({span})"
