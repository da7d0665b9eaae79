"""Memory of a training step, estimated before the first: what one row's forward keeps for backward, times the rows.

Measured and not derived from a config, so that it holds for any family, expert backend, adapter and dtype. Nothing is
trained and nothing is changed.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class StepMemory:
    """Bytes, about; the allocator's and the libraries' own come on top.

    Attributes:
        weights: Of the whole model.
        optimizer: AdamW's two moments of what is trained.
        gradients: Of what is trained.
        activations: What forward keeps for backward.
        work: What backward works with: the float32 logits `[tokens, vocab]` three times (their softmax, two
            gradients), or one layer computed again and its gradients, whichever is more.
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
        listed = ", ".join(f"{name} {_size(value)}" for name, value in parts.items())
        return f"about {_size(self.total)} at the peak: {listed}"


def _size(value: int) -> str:
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def step_memory(
    model: nn.Module,
    row: Mapping[str, Tensor],
    *,
    batch_size: int,
    accumulates: bool = False,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
) -> StepMemory:
    """Estimate a step of one process with AdamW.

    Args:
        row: A training row as the model takes it, each tensor `[row_length]`, int64.
        batch_size: Rows at a time.
        accumulates: Whether a step has several such batches.
        checkpointing: Whether layers keep their input alone and are computed again in backward.
        autocast: The dtype of mixed precision, if it is on.
    """
    config = cast(PreTrainedModel, model).config.get_text_config()
    tokens = batch_size * len(row["input_ids"])
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    logits = tokens * config.vocab_size * 4
    kept = max(0, batch_size * saved_bytes(model, row, autocast) - logits)
    layer = kept // config.num_hidden_layers
    if checkpointing:
        width = next(p for p in model.parameters() if p.is_floating_point()).element_size()
        kept = config.num_hidden_layers * tokens * config.hidden_size * width
    return StepMemory(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()),
        optimizer=2 * trained,
        gradients=trained,
        activations=kept,
        work=max(3 * logits, 2 * layer if checkpointing else layer),
        accumulates=accumulates,
    )


def saved_bytes(model: nn.Module, row: Mapping[str, Tensor], autocast: torch.dtype | None = None) -> int:
    """Bytes of the distinct storages that the forward of one row saves for backward, without the model's own."""
    device = next(model.parameters()).device
    batch = {name: column[None].to(device) for name, column in row.items()}
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # alive until all are counted, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    was_training = model.training
    model.eval()  # no dropout, no balancing counts: a look changes nothing
    mixed = nullcontext() if autocast is None else torch.autocast(device.type, autocast)
    try:
        with torch.enable_grad(), mixed, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch, use_cache=False).loss
    finally:
        model.train(was_training)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    del loss
    return sum(size for address, size in storages.items() if address not in own)
