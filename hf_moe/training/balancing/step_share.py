"""Share of an optimizer step that a micro-batch is, so that losses weigh the same however the step is cut.

The Trainer divides the task's loss by the items (labels) of the whole step. Balancing losses are means over tokens, so
tokens are what is counted here: padding is left out, masked labels are not.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def count_tokens(batch: Any) -> Tensor | None:
    """Tokens of a model's inputs, padding left out; None if they do not show them (a batch of raw prompts)."""
    if not isinstance(batch, Mapping):
        return None
    ids = batch.get("input_ids")
    given = ids if isinstance(ids, Tensor) else batch.get("inputs_embeds")
    if not isinstance(given, Tensor) or given.dim() < 2:
        return None
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.bool().sum()
    return torch.tensor(given.shape[0] * given.shape[1], device=given.device)


def count_step_tokens(batches: Sequence[Any], device: torch.device) -> Tensor | None:
    """Tokens of all micro-batches of this process; None if one of them does not show them."""
    counts = [count_tokens(batch) for batch in batches]
    if not counts or any(count is None for count in counts):
        return None
    return torch.stack([count.to(device) for count in counts if count is not None]).sum()


def step_share(tokens: Tensor, step_tokens: Tensor) -> Tensor:
    """`tokens / step_tokens`, a scalar of the best precision that the device has; 0 for a step of padding alone."""
    dtype = torch.float32 if tokens.device.type == "mps" else torch.float64
    return tokens.to(dtype) / step_tokens.to(tokens.device, dtype).clamp_min(1)
