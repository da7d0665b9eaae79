"""What a forward keeps for backward, in bytes: counted where autograd packs it, on any device."""

from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, batch: Mapping[str, Tensor], autocast: torch.dtype | None = None) -> int:
    """Bytes of the distinct storages that a forward saves for backward, without the model's own.

    Args:
        batch: What the model's forward takes, labels included, on its device; also the meta device.
        autocast: The dtype of mixed precision, if it is on.
    """
    own = {_key(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: list[Tensor] = []  # alive until all are counted, so that no storage takes another's place

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    was_training = model.training
    model.eval()  # no dropout, no balancing counts: a look changes nothing
    mixed = nullcontext() if autocast is None else torch.autocast(next(iter(batch.values())).device.type, autocast)
    try:
        with torch.enable_grad(), mixed, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(**batch, use_cache=False).loss
    finally:
        model.train(was_training)
    storages = {_key(tensor): tensor.untyped_storage().nbytes() for tensor in kept}
    del loss
    return sum(size for key, size in storages.items() if key not in own)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # the address of the data is 0 on the meta device
