"""The experts implementations that `set_experts_implementation` accepts, as data: a name, and what it refuses."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

Refusal = Callable[[nn.Module, torch.dtype, torch.device], str | None]


def _accepts(experts: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    return None


@dataclass(frozen=True)
class ExpertBackend:
    """One experts implementation.

    Attributes:
        name: Its name for `experts_implementation=` and `set_experts_implementation`.
        refuses: Called with the experts module, the dtype of its weights and their device; returns why this backend
            cannot run them, as a sentence that ends with a way out, or None. Slowness and memory are no refusal.
    """

    name: str
    refuses: Refusal = _accepts


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
    if getattr(experts, "has_post_expert_norm", False):
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
    if getattr(experts, "has_post_expert_norm", False):
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


# what stands in the host's registry, and `eager`: the forward of the experts class itself
BACKENDS: dict[str, ExpertBackend] = {
    backend.name: backend
    for backend in (
        ExpertBackend("eager"),
        ExpertBackend("batched_mm"),
        ExpertBackend("grouped_mm", _grouped_mm_refuses),
        ExpertBackend("sonicmoe", _sonicmoe_refuses),
        ExpertBackend("deepgemm", _deepgemm_refuses),
    )
}


def available_backends() -> list[str]:
    """Names that the installed host accepts; `BACKENDS` knows all but those that other packages registered."""
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


def has_custom_gate(experts: nn.Module) -> bool:
    """Whether the class brings an `_apply_gate` of its own, instead of `act_fn(gate) * up` from the decorator."""
    return type(experts)._apply_gate.__module__ != ExpertsInterface.__module__  # type: ignore[attr-defined]


def expert_shape(experts: nn.Module) -> tuple[int, ...]:
    """`(rows, columns)` of one expert's down projection: its two widths in either layout; () if not stored densely."""
    weight = experts._parameters.get("down_proj")
    return tuple(weight.shape[1:]) if weight is not None and weight.dim() == 3 else ()
