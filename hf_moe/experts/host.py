"""The experts implementations that transformers brings, what each refuses, and which may be delegated to.

Source: transformers 5.23, `integrations/{moe,sonicmoe,deepgemm}.py`, and runs on the CPU.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_moe.experts.contract import expert_shape, has_custom_gate, has_post_expert_norm

Refusal = Callable[[nn.Module, torch.dtype, torch.device], str | None]

DELEGATE = "HF_MOE_DELEGATE"


def accepts(experts: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses nothing."""


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


HOST_REFUSALS: dict[str, Refusal] = {
    "eager": accepts,  # the forward of the experts class itself
    "batched_mm": accepts,
    "grouped_mm": _grouped_mm_refuses,
    "sonicmoe": _sonicmoe_refuses,
    "deepgemm": _deepgemm_refuses,
}


def delegates() -> list[str]:
    """GPU kernels of the host that the user lets `hf_moe` choose, best first: `HF_MOE_DELEGATE=sonicmoe,deepgemm`.

    Raises:
        ValueError: If the variable names something else.
    """
    names = [name.strip() for name in os.environ.get(DELEGATE, "").split(",") if name.strip()]
    for name in names:
        if name not in ("sonicmoe", "deepgemm"):
            raise ValueError(f"{DELEGATE} may hold 'sonicmoe' and 'deepgemm', separated by a comma, got {name!r}.")
    return names
