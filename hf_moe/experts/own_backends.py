"""The backends of hf_moe: what each refuses, what it suits, and how its operators are loaded.

Operators are imported when they first run: the compiled ones need a C++ compiler or Triton, which nothing else here
does.
"""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch

from hf_moe.experts.crossover import crossover
from hf_moe.experts.grouped import grouped_linear, has_grouped_mm
from hf_moe.experts.pipeline import Operators
from hf_moe.experts.request import Backend, Request
from hf_moe.io.installation import install_command

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRITON_FORMATS = ("dense", "fp8")


def _cpu_refuses(request: Request) -> str | None:
    if request.device.type != "cpu":
        return f"hf_moe_cpu runs on the CPU, the experts are on {request.device.type}: use 'hf_moe'."
    reason = _cpu_build().unavailable_reason()
    return None if reason is None else f"hf_moe_cpu cannot be built: {reason}"


@functools.cache
def _cpu_build() -> Any:
    return importlib.import_module("hf_moe.kernels.cpu.build")


def _cpu_suits(request: Request) -> str | None:
    return "compiled kernels read the weights of each expert once" if request.device.type == "cpu" else None


def _triton_refuses(request: Request) -> str | None:
    device = request.device
    if device.type != "cuda" and not _is_interpreting():
        return f"hf_moe_triton needs a GPU, the experts are on {device.type}: use 'hf_moe'."
    if request.dtype not in TRITON_DTYPES:
        return f"hf_moe_triton multiplies float32, bfloat16 and float16, not {request.dtype}: use 'hf_moe_grouped'."
    if importlib.util.find_spec("triton") is None:
        return f"hf_moe_triton needs Triton: {install_command('triton')}, or use 'hf_moe_grouped'."
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"hf_moe_triton needs SM80 or newer, this GPU is SM{major}{minor}: use 'hf_moe_grouped'."
    return _fp8_refuses(device) if request.format == "fp8" else None


def _fp8_refuses(device: torch.device) -> str | None:
    if device.type == "cuda" and torch.version.hip is not None:
        return "hf_moe_triton reads fp8 weights on NVIDIA GPUs, this one is AMD's: use 'hf_moe_grouped'."
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        return f"hf_moe_triton reads fp8 weights from SM89 on, this GPU is SM{major}{minor}: use 'hf_moe_grouped'."
    return None


def _triton_suits(request: Request) -> str | None:
    return None if request.device.type == "cpu" else "fused kernels need no permuted copies"


def _is_interpreting() -> bool:
    """Triton's own switch to run kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _hybrid_refuses(request: Request) -> str | None:
    if not has_grouped_mm(request.widths, request.dtype, request.device):
        return "torch's grouped product does not take these weights on this device: use 'hf_moe'."
    return _triton_refuses(request)


def _hybrid_suits(request: Request) -> str | None:
    # adapters: the layer's steps one by one would write, and keep, what the fused operator never holds
    if not request.many_rows or request.adapted or request.format != "dense":
        return None
    least = crossover(request.device, request.dtype)
    if least is None or not has_grouped_mm(request.widths, request.dtype, request.device):
        return None
    return f"torch's grouped product is taken to lead from {least}"


def _always_suits(request: Request) -> str:
    return "plain torch runs everywhere"


@torch.compiler.assume_constant_result
def many_rows_from(dtype: torch.dtype, device: torch.device, adapted: bool) -> int | None:
    """Mean rows an expert that a call needs to have many; None where their number decides nothing."""
    least = None if adapted else crossover(device, dtype)
    return None if least is None else least.rows_per_expert


def has_many_rows(
    num_rows: int, num_experts: int, dtype: torch.dtype, device: torch.device, adapted: bool = False
) -> bool:
    """Whether so many routed rows (T*K) are `many_rows` of a `Request`; never symbolic."""
    least = many_rows_from(dtype, device, adapted)
    # an exported program is one for all lengths
    if least is None or torch.compiler.is_exporting():
        return False
    # a branch, so that torch.compile guards on which side of the threshold the number is, not on the number
    if num_rows >= least * num_experts:  # noqa: SIM103
        return True
    return False


def _cpu_operators() -> Operators:
    _cpu_build().load_kernels()
    ops = importlib.import_module("hf_moe.kernels.cpu.ops")
    lora = importlib.import_module("hf_moe.kernels.cpu.low_rank")
    fused = {("dense", False): ops.cpu_experts, ("dense", True): lora.cpu_experts_lora}
    return Operators(ops.cpu_grouped_linear, fused)


def _triton_operators() -> Operators:
    ops = importlib.import_module("hf_moe.kernels.triton.ops")
    fused = {(form, False): ops.triton_experts for form in _TRITON_FORMATS}
    fused |= {(form, True): ops.triton_experts_lora for form in _TRITON_FORMATS}
    return Operators(ops.triton_grouped_linear, fused)


def _hybrid_operators() -> Operators:
    hybrid = importlib.import_module("hf_moe.kernels.triton.hybrid")
    return Operators(grouped_linear, {("dense", False): hybrid.triton_hybrid_experts})


def _grouped_operators() -> Operators:
    return Operators(grouped_linear)


# in the order in which `hf_moe` asks what suits it
OWN = (
    Backend("hf_moe_cpu", _cpu_refuses, _cpu_operators, ("dense",), _cpu_suits, takes_low_rank=True),
    # torch's products with Triton between them
    Backend(
        "hybrid", _hybrid_refuses, _hybrid_operators, ("dense",), _hybrid_suits, "hf_moe_grouped", takes_low_rank=True
    ),
    Backend("hf_moe_triton", _triton_refuses, _triton_operators, _TRITON_FORMATS, _triton_suits, takes_low_rank=True),
    Backend("hf_moe_grouped", load=_grouped_operators, suits=_always_suits, takes_low_rank=True),
)
