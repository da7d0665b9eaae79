"""Does it fit: the memory of a training step by every method, and which GPUs hold it. No weight is read."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_moe.io.installation import install_command
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.loading.pretrained import build_empty
from hf_moe.planner import methods
from hf_moe.planner.quantised import QuantisedWeights, quantised_weights
from hf_moe.planner.shapes_only import ShapesError, computed_saved_bytes
from hf_moe.planner.step_memory import GIB, StepMemory, bytes_of, step_memory

RANKS = (8, 16, 32)
# for the GPU's context and libraries; a guess, not measured here
RESERVE = GIB
# share of what is then left that a step may take before it is called tight: fragments of memory are lost
COMFORT = 0.92


@dataclass(frozen=True)
class MethodFit:
    """Memory of one method.

    Attributes:
        name: Of the method.
        trained: Parameters that it trains.
        memory: With gradient checkpointing.
        unchecked: Without.
        knows_activations: False where the model's forward cannot be run on shapes: both are without activations.
    """

    name: str
    trained: int
    memory: StepMemory
    unchecked: StepMemory
    knows_activations: bool

    def verdict(self, gpu: int) -> str:
        """Whether a GPU of `gpu` GiB holds it.

        Returns:
            "yes"; "checkpointing": yes with gradient checkpointing; "tight": only just with it; "no"; "unknown".
        """
        usable = gpu * GIB - RESERVE
        if self.memory.total > usable:
            return "no"
        if not self.knows_activations:
            return "unknown"
        if self.memory.total > COMFORT * usable:
            return "tight"
        return "yes" if self.unchecked.total <= COMFORT * usable else "checkpointing"


@dataclass(frozen=True)
class Fit:
    """The memory of all methods on one model, in bytes.

    Attributes:
        dtype: Of the weights, as the config has it.
        weights: Of the model in this dtype.
        row_length: Tokens of a row.
        batch_size: Rows at a time.
        quantised: What a quantised checkpoint takes; None without a quantiser.
        methods: In the order of a table.
        notes: What could not be told, a sentence each.
    """

    dtype: str
    weights: int
    row_length: int
    batch_size: int
    quantised: QuantisedWeights | None
    methods: tuple[MethodFit, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, bytes as integers; each total beside its parts."""
        found = asdict(self)
        for each, values in zip(self.methods, found["methods"], strict=True):
            values["memory"]["total"] = each.memory.total
            values["unchecked"]["total"] = each.unchecked.total
        return found


def fit(config: PreTrainedConfig, row_length: int, batch_size: int = 1) -> Fit:
    """Compute the memory of a training step by every method, on one GPU, with gradients accumulated over batches.

    Args:
        row_length: Tokens of a row; at most as many as the model's context are counted.

    Raises:
        ValueError: If no model is built of the config.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or row_length
    tokens, model = min(row_length, context), build_empty(config)
    quantised, dtype = quantised_weights(model, config), next(model.parameters()).dtype
    has_experts = bool(moe_layers(model))
    found, notes = [], list(_missing(config, has_experts))
    for name, build in _builders(config, dtype, has_experts):
        try:
            built = build()
        except (ImportError, ValueError) as error:
            notes.append(f"{name} is not counted: {error}")
            continue
        each, unknown = _method_fit(name, built, quantised, tokens, batch_size)
        found.append(each)
        notes += [] if unknown is None or unknown in notes else [unknown]
    weights = bytes_of(model.parameters())
    return Fit(str(dtype).removeprefix("torch."), weights, tokens, batch_size, quantised, tuple(found), tuple(notes))


def _builders(
    config: PreTrainedConfig, dtype: torch.dtype, has_experts: bool
) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    if has_experts and find_spec("peft") is not None:
        for r in RANKS:
            yield f"expert LoRA r={r}", partial(methods.expert_lora, config, r)
        yield "adapter experts", partial(methods.adapter_experts, config)
    if has_experts:
        yield f"ESFT, {methods.ESFT_BUDGET:.0%}", partial(methods.esft, config)
    yield f"full, {str(dtype).removeprefix('torch.')}", partial(methods.full, config)
    if dtype != torch.float32:
        yield "full, float32", partial(methods.full, config, torch.float32)


def _missing(config: PreTrainedConfig, has_experts: bool) -> Iterator[str]:
    if has_experts and find_spec("peft") is None:
        yield f"expert LoRA and adapter experts need peft. Install it with: {install_command('recipes')}"
    if config.get_text_config() is not config:
        yield (
            "The model reads more than text: full fine-tuning counts all its parts, of which recipes freeze those "
            "that text does not reach."
        )


def _method_fit(
    name: str, model: nn.Module, quantised: QuantisedWeights | None, tokens: int, batch_size: int
) -> tuple[MethodFit, str | None]:
    saved, unknown = 0, None
    try:
        saved = computed_saved_bytes(model, tokens, batch_size)
    except ShapesError as error:
        unknown = f"Activations are not known (?): the model's forward does not run on shapes alone ({error})."
    weights = bytes_of(model.parameters())
    if quantised is not None and not name.startswith(("ESFT", "full")):
        weights += quantised.in_training - quantised.dense
    memory, unchecked = (
        step_memory(
            model,
            saved=saved,
            tokens=0 if unknown else batch_size * tokens,
            accumulates=True,
            checkpointing=checkpointing,
            weights=weights,
        )
        for checkpointing in (True, False)
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return MethodFit(name, trained, memory, unchecked, unknown is None), unknown
