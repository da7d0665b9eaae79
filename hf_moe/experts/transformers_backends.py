"""The backends that transformers brings, what each refuses, and which of them `hf_moe` may choose.

Source: transformers 5.23, `integrations/{moe,sonicmoe,deepgemm}.py`, and runs on the CPU.
"""

import importlib.util
import os
from collections.abc import Callable

import torch

from hf_moe.experts.contract import has_custom_gate, has_post_expert_norm
from hf_moe.experts.request import Backend, Refusal, Request, refuses_nothing
from hf_moe.layers.storage import attached_storage

DELEGATE = "HF_MOE_DELEGATE"


def _own_tensors(refuses: Refusal) -> Refusal:
    """`refuses`, and what the module's tensors do not hold: transformers reads those alone."""

    def refusal(request: Request) -> str | None:
        if attached_storage(request.experts) is not None:
            return (
                f"transformers reads the module's own tensors, but the weights are stored as {request.format}: use "
                "'hf_moe'."
            )
        return _fp8_refuses(request) if request.format == "fp8" else refuses(request)

    return refusal


def _fp8_refuses(request: Request) -> str | None:
    """Transformers' forwards of fp8 experts, "eager" too, fetch kernels from the Hub.

    Source: transformers 5.23, `integrations/finegrained_fp8.py`.
    """
    if request.device.type not in ("cuda", "xpu"):
        return f"transformers' fp8 kernels need a GPU, the experts are on {request.device.type}: use 'hf_moe'."
    if importlib.util.find_spec("kernels") is None:
        return "transformers' fp8 kernels need the package `kernels`: install it, or use 'hf_moe'."
    return None


def _sonicmoe_fp8(request: Request) -> str | None:
    if request.format == "fp8":
        return "transformers has no sonicmoe for fp8 experts: use 'hf_moe'."
    return _own_tensors(_sonicmoe_refuses)(request)


def _grouped_mm_refuses(request: Request) -> str | None:
    """Outside of `torch.compile`; on CUDA devices before SM80 transformers runs a loop that accepts everything.

    Source: run on torch 2.13 CPU; transformers 5.23, `integrations/moe.py::_can_use_grouped_mm`.
    """
    dtype, device = request.dtype, request.device
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return (
            f"torch's grouped_mm multiplies float32, bfloat16 and float16, not {dtype}: use 'eager' or 'batched_mm'."
        )
    for width in request.widths:
        if width * dtype.itemsize % 16:
            return (
                f"torch's grouped_mm needs rows of a multiple of 16 bytes; {width} {dtype} values are "
                f"{width * dtype.itemsize} bytes: use 'eager' or 'batched_mm', or a width that is a multiple of "
                f"{16 // dtype.itemsize}."
            )
    return None


def _sonicmoe_refuses(request: Request) -> str | None:
    """Source: transformers 5.23, `integrations/sonicmoe.py`."""
    experts = request.experts
    if not experts.has_gate:
        return "sonicmoe runs gated experts only: use 'grouped_mm'."
    if has_post_expert_norm(experts):
        return "sonicmoe has no norm after the experts: use 'grouped_mm'."
    if has_custom_gate(experts):
        # transformers does not check this and returns wrong values
        return f"sonicmoe ignores the gate that {type(experts).__name__} defines: use 'grouped_mm'."
    activation = getattr(experts.config, "hidden_act", "silu").lower()
    if activation not in ("silu", "gelu", "relu"):
        return f"sonicmoe has the activations silu, gelu and relu, not {activation}: use 'grouped_mm'."
    return _needs_kernel("sonicmoe", request.device, "a GPU from SM90 on", lambda major: major >= 9)


def _deepgemm_refuses(request: Request) -> str | None:
    """Source: transformers 5.23, `integrations/deepgemm.py`."""
    if request.dtype is not torch.bfloat16:
        return f"deepgemm runs bfloat16 only, not {request.dtype}: load the model in bfloat16, or use 'grouped_mm'."
    if has_post_expert_norm(request.experts):
        return "deepgemm has no norm after the experts: use 'grouped_mm'."
    return _needs_kernel("deepgemm", request.device, "a GPU with SM90 or SM100", lambda major: major in (9, 10))


def _needs_kernel(name: str, device: torch.device, gpu: str, runs_on: Callable[[int], bool]) -> str | None:
    if device.type != "cuda":
        return f"{name} needs {gpu}, the experts are on {device.type}: use 'grouped_mm'."
    major, minor = torch.cuda.get_device_capability(device)
    if not runs_on(major):
        return f"{name} needs {gpu}, this one is SM{major}{minor}: use 'grouped_mm'."
    if importlib.util.find_spec("kernels") is None:
        return f"{name} needs the package `kernels`: install it, or use 'grouped_mm'."
    return None


TRANSFORMERS = (
    Backend("eager", _own_tensors(refuses_nothing)),  # the forward of the experts class itself
    Backend("batched_mm", _own_tensors(refuses_nothing)),
    Backend("grouped_mm", _own_tensors(_grouped_mm_refuses)),
    Backend("sonicmoe", _sonicmoe_fp8),
    Backend("deepgemm", _own_tensors(_deepgemm_refuses)),
)


def delegates() -> list[str]:
    """GPU kernels of transformers that the user lets `hf_moe` choose, best first: `HF_MOE_DELEGATE=sonicmoe,deepgemm`.

    Raises:
        ValueError: If the variable names something else.
    """
    names = [name.strip() for name in os.environ.get(DELEGATE, "").split(",") if name.strip()]
    for name in names:
        if name not in ("sonicmoe", "deepgemm"):
            raise ValueError(f"{DELEGATE} may hold 'sonicmoe' and 'deepgemm', separated by a comma, got {name!r}.")
    return names
