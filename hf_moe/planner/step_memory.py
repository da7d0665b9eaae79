"""Bytes of a training step with AdamW, from its parts.

Whatever is known of a model, its weights or their shapes alone, these functions add it up: recipes measure what the
forward of one row keeps (`saved_bytes`), `fit` computes it (`shapes_only`).

Conventions: a gradient has the dtype of its parameter, and so have AdamW's two moments, as in `torch.optim.AdamW`. A
parameter that is trained in bfloat16 takes 2 + 2 + 4 bytes, one in float32 4 + 4 + 8. What torch's allocator and the
GPU's libraries need comes on top (`fit.RESERVE`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hf_moe.planner.saved_bytes import saved_bytes

GIB = 2**30


@dataclass(frozen=True)
class StepMemory:
    """Bytes, about.

    Attributes:
        weights: Of the whole model, what is trained included.
        optimizer: AdamW's two moments of what is trained.
        gradients: Of what is trained.
        activations: What forward keeps for backward.
        work: What backward works with: logits and their gradients, or one layer computed again and its gradients,
            whichever is more.
        accumulates: Whether gradients of earlier rows lie beside the activations of later ones.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    work: int
    accumulates: bool

    @property
    def total(self) -> int:
        """At the peak: activations go as gradients come, unless these were there already."""
        forward = self.activations + self.work
        step = forward + self.gradients if self.accumulates else max(forward, self.gradients)
        return self.weights + self.optimizer + step

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "activations": self.activations + self.work,
        }
        listed = ", ".join(f"{name} {size_text(value)}" for name, value in parts.items())
        return f"about {size_text(self.total)} at the peak: {listed}"


def size_text(value: int) -> str:
    """Bytes in GiB (2^30) or MiB (2^20)."""
    return f"{value / GIB:.1f} GiB" if value >= GIB else f"{value / 2**20:.0f} MiB"


def bytes_of(tensors: Any) -> int:
    """Bytes of all tensors of an iterable, also of those without values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measured_step_memory(
    model: nn.Module,
    row: Mapping[str, Tensor],
    *,
    batch_size: int,
    accumulates: bool = False,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
) -> StepMemory:
    """Estimate a step of one process from the forward of one row, which is run; nothing is trained or changed.

    Measured and not derived from a config, so that it holds for any family, expert backend, adapter and dtype.

    Args:
        row: A training row as the model takes it, each tensor `[row_length]`, int64.
        batch_size: Rows at a time.
        accumulates: Whether a step has several such batches.
        checkpointing: Whether layers keep their input alone and are computed again in backward.
        autocast: The dtype of mixed precision, if it is on.

    Raises:
        torch.OutOfMemoryError: If that forward, which keeps all that backward needs, does not fit the device.
    """
    device = next(model.parameters()).device
    batch = {name: column[None].to(device) for name, column in row.items()}
    return step_memory(
        model,
        saved=batch_size * saved_bytes(model, batch, autocast),
        tokens=batch_size * len(row["input_ids"]),
        accumulates=accumulates,
        checkpointing=checkpointing,
    )


def step_memory(
    model: nn.Module,
    *,
    saved: int,
    tokens: int,
    accumulates: bool,
    checkpointing: bool,
    weights: int | None = None,
) -> StepMemory:
    """Add up a step of one process.

    Args:
        model: With what is trained marked as such; values are not read.
        saved: Bytes that the forward of all rows keeps for backward, with the loss.
        tokens: Of all rows at a time.
        accumulates: Whether a step has several such batches.
        checkpointing: Whether layers keep their input alone and are computed again in backward.
        weights: Bytes of the whole model, where they are others than those of its parameters.
    """
    config = cast(Any, model).config.get_text_config()
    trained = bytes_of(p for p in model.parameters() if p.requires_grad)
    kept = max(0, saved - 4 * tokens * config.vocab_size)  # the loss keeps float32 logits: counted below
    memory = StepMemory(
        weights=bytes_of(model.parameters()) if weights is None else weights,
        optimizer=2 * trained,
        gradients=trained,
        activations=kept,
        work=max(logits_bytes(tokens, config.vocab_size), kept // config.num_hidden_layers),
        accumulates=accumulates,
    )
    return with_checkpointing(memory, model, tokens) if checkpointing else memory


def with_checkpointing(memory: StepMemory, model: nn.Module, tokens: int) -> StepMemory:
    """The step whose `memory` without gradient checkpointing is known, with it; `tokens` of all rows at a time."""
    config = cast(Any, model).config.get_text_config()
    width = next(p for p in model.parameters() if p.is_floating_point()).element_size()
    layer = memory.activations // config.num_hidden_layers
    return replace(
        memory,
        activations=config.num_hidden_layers * tokens * config.hidden_size * width,
        work=max(logits_bytes(tokens, config.vocab_size), 2 * layer),
    )


def logits_bytes(tokens: int, vocab_size: int) -> int:
    """What the backward of transformers' loss works with, `[tokens, vocab]`: a float32 softmax and two gradients.

    Logits of 16 bits are gone by then.
    """
    return 3 * 4 * tokens * vocab_size
