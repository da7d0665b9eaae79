"""The experts implementations that `set_experts_implementation` accepts, as data: a name, and what it refuses."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe.experts.contract import expert_shape, has_custom_gate, has_post_expert_norm
from hf_moe.experts.engines import REFUSALS, Refusal, accepts, forward_of
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
    """

    name: str
    refuses: Refusal = accepts
    forward: ExpertsForward | None = None


def _grouped_mm_refuses(experts: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Outside of `torch.compile`; on CUDA devices before SM80 the host runs a loop that accepts everything.

    Source: run on torch 2.13 CPU; transformers 5.23, `integrations/moe.py::_can_use_grouped_mm`.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return (
            f"torch's grouped_mm multiplies float32, bfloat16 and float16, not {dtype}: use 'eager' or 'batched_mm'."
        )
    for width in expert_shape(experts):
        if width * dtype.itemsize % 16:
            return (
                f"torch's grouped_mm needs rows of a multiple of 16 bytes; {width} {dtype} values are "
                f"{width * dtype.itemsize} bytes: use 'eager' or 'batched_mm', or a width that is a multiple of "
                f"{16 // dtype.itemsize}."
            )
    return None


def _sonicmoe_refuses(experts: Any, dtype: torch.dtype, device: torch.device) -> str | None:
    """Source: transformers 5.23, `integrations/sonicmoe.py`."""
    if not experts.has_gate:
        return "sonicmoe runs gated experts only: use 'grouped_mm'."
    if has_post_expert_norm(experts):
        return "sonicmoe has no norm after the experts: use 'grouped_mm'."
    if has_custom_gate(experts):
        # the host does not check this and returns wrong values
        return f"sonicmoe ignores the gate that {type(experts).__name__} defines: use 'grouped_mm'."
    activation = getattr(experts.config, "hidden_act", "silu").lower()
    if activation not in ("silu", "gelu", "relu"):
        return f"sonicmoe has the activations silu, gelu and relu, not {activation}: use 'grouped_mm'."
    return _needs_kernel("sonicmoe", device, "a GPU from SM90 on", lambda major: major >= 9)


def _deepgemm_refuses(experts: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    """Source: transformers 5.23, `integrations/deepgemm.py`."""
    if dtype is not torch.bfloat16:
        return f"deepgemm runs bfloat16 only, not {dtype}: load the model in bfloat16, or use 'grouped_mm'."
    if has_post_expert_norm(experts):
        return "deepgemm has no norm after the experts: use 'grouped_mm'."
    return _needs_kernel("deepgemm", device, "a GPU with SM90 or SM100", lambda major: major in (9, 10))


def _needs_kernel(name: str, device: torch.device, gpu: str, runs_on: Callable[[int], bool]) -> str | None:
    if device.type != "cuda":
        return f"{name} needs {gpu}, the experts are on {device.type}: use 'grouped_mm'."
    major, minor = torch.cuda.get_device_capability(device)
    if not runs_on(major):
        return f"{name} needs {gpu}, this one is SM{major}{minor}: use 'grouped_mm'."
    if importlib.util.find_spec("kernels") is None:
        return f"{name} needs the package `kernels`: install it, or use 'grouped_mm'."
    return None


_OF_THE_HOST = (
    ExpertBackend("eager"),  # the forward of the experts class itself
    ExpertBackend("batched_mm"),
    ExpertBackend("grouped_mm", _grouped_mm_refuses),
    ExpertBackend("sonicmoe", _sonicmoe_refuses),
    ExpertBackend("deepgemm", _deepgemm_refuses),
)
OURS = (
    *(ExpertBackend(name, refuses, forward_of(name)) for name, refuses in REFUSALS.items()),
    ExpertBackend("hf_moe_reference", forward=reference_forward),
)
BACKENDS: dict[str, ExpertBackend] = {backend.name: backend for backend in (*_OF_THE_HOST, *OURS)}


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
