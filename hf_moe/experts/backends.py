"""The experts implementations that `set_experts_implementation` accepts, as data: a name, and what it refuses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe.experts.engines import REFUSALS, forward_of
from hf_moe.experts.host import HOST_REFUSALS, Refusal, accepts
from hf_moe.experts.reference import reference_forward

ExpertsForward = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ExpertBackend:
    """One experts implementation.

    Attributes:
        name: Its name for `experts_implementation=` and `set_experts_implementation`.
        refuses: Called with the experts module, the dtype of its weights and their device; returns why this backend
            cannot run them, as a sentence that ends with a way out, or None. Slowness and memory are no refusal.
        forward: `(experts, hidden_states [T, H], top_k_index [T, K], top_k_weights [T, K]) -> [T, H]`; None for those
            that the host brings.
        takes_low_rank: Whether `forward` also takes `low_rank`, the factors of adapters on the experts.
    """

    name: str
    refuses: Refusal = accepts
    forward: ExpertsForward | None = None
    takes_low_rank: bool = False


OURS = (
    *(ExpertBackend(name, refuses, forward_of(name), takes_low_rank=True) for name, refuses in REFUSALS.items()),
    ExpertBackend("hf_moe_reference", forward=reference_forward),
)
BACKENDS: dict[str, ExpertBackend] = {
    **{name: ExpertBackend(name, refuses) for name, refuses in HOST_REFUSALS.items()},
    **{backend.name: backend for backend in OURS},
}


def available_backends() -> list[str]:
    """Names that the installed host accepts; `BACKENDS` knows all but those that other packages registered."""
    # here, because registration imports this file as soon as the registry is there
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ["eager", *ALL_EXPERTS_FUNCTIONS.keys()]


def refusals(experts: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Backends that cannot run `experts`, with the reason; those that can are absent.

    Args:
        experts: A module under the host's `use_experts_implementation` decorator.
        dtype: Of its weights.
        device: Of its weights; on the meta device only CUDA kernels are refused.
    """
    reasons = {
        name: BACKENDS[name].refuses(experts, dtype, device) for name in available_backends() if name in BACKENDS
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}
