"""Our experts implementations: what each refuses, the engine behind it, and which one `hf_moe` chooses.

Engines are imported when they first run: the compiled ones need a C++ compiler or Triton, which nothing else here
does.
"""

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_moe.experts.contract import expert_shape, foreign_storage, read_weights
from hf_moe.experts.grouped import grouped_linear, has_grouped_mm
from hf_moe.experts.host import HOST_REFUSALS, Refusal, accepts, delegates
from hf_moe.experts.pipeline import Engine, run_experts
from hf_moe.experts.reference import reference_forward
from hf_moe.kernels.layer_call import LowRankPair

logger = logging.getLogger(__name__)

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Where the products are this large, torch's grouped product (CUTLASS, TMA) beats plain Triton on SM90 and SM100.
# An estimate from published figures (Mixtral-like rows), not measured by us.
MANY_ROWS_PER_EXPERT = 1024
ADAPTERS_NEED_PLAIN = "the weights are stored as {}: run them as PEFT does, or load the model unquantised."


def storage_refuses(experts: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    if (storage := foreign_storage(experts)) is None:
        return None
    return f"{storage} holds the expert weights in a form that our operators cannot read: use 'hf_moe_reference'."


def cpu_refuses(experts: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    if (reason := storage_refuses(experts, dtype, device)) is not None:
        return reason
    if device.type != "cpu":
        return f"hf_moe_cpu runs on the CPU, the experts are on {device.type}: use 'hf_moe'."
    if "hf_moe_cpu" in _BROKEN:
        return _BROKEN["hf_moe_cpu"]
    reason = importlib.import_module("hf_moe.kernels.cpu.build").unavailable_reason()
    return None if reason is None else f"hf_moe_cpu cannot be built: {reason}"


def triton_refuses(experts: nn.Module, dtype: torch.dtype, device: torch.device) -> str | None:
    if (reason := storage_refuses(experts, dtype, device)) is not None:
        return reason
    if device.type != "cuda" and not _is_interpreting():
        return f"hf_moe_triton needs a GPU, the experts are on {device.type}: use 'hf_moe'."
    if dtype not in TRITON_DTYPES:
        return f"hf_moe_triton multiplies float32, bfloat16 and float16, not {dtype}: use 'hf_moe_grouped'."
    if importlib.util.find_spec("triton") is None:
        return "hf_moe_triton needs Triton: pip install \"hf-moe[triton]\", or use 'hf_moe_grouped'."
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"hf_moe_triton needs SM80 or newer, this GPU is SM{major}{minor}: use 'hf_moe_grouped'."
    return None


def _is_interpreting() -> bool:
    """Triton's own switch to run kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


REFUSALS: dict[str, Refusal] = {
    "hf_moe": accepts,
    "hf_moe_cpu": cpu_refuses,
    "hf_moe_triton": triton_refuses,
    "hf_moe_grouped": storage_refuses,
}


class Choice(NamedTuple):
    """What `hf_moe` runs: an implementation's name, why, and whether a better one had to be passed over."""

    name: str
    reason: str
    is_second_best: bool = False

    def __str__(self) -> str:
        return f"hf_moe runs {self.name}: {self.reason.rstrip('.')}."


def choose(
    experts: nn.Module, dtype: torch.dtype, device: torch.device, many_rows: bool = False, adapted: bool = False
) -> Choice:
    """What `hf_moe` runs.

    Args:
        dtype: Of the experts' weights.
        device: Of the experts' weights.
        many_rows: Whether an expert gets `MANY_ROWS_PER_EXPERT` or more on average.
        adapted: Whether low-rank factors come with the call; the host's kernels cannot take them.
    """
    if (reason := storage_refuses(experts, dtype, device)) is not None:
        return Choice("hf_moe_reference", reason, is_second_best=True)
    if device.type == "cpu":
        if (reason := cpu_refuses(experts, dtype, device)) is None:
            return Choice("hf_moe_cpu", "compiled kernels read the weights of each expert once")
        return Choice("hf_moe_grouped", reason, is_second_best=True)
    for name in () if adapted else delegates():
        if HOST_REFUSALS[name](experts, dtype, device) is None:
            return Choice(name, "HF_MOE_DELEGATE allows the host's kernel")
    if (reason := triton_refuses(experts, dtype, device)) is not None:
        return Choice("hf_moe_grouped", reason, is_second_best=True)
    if many_rows and rows_matter(device) and has_grouped_mm(expert_shape(experts), dtype, device):
        return Choice("hf_moe_grouped", f"torch's grouped product leads from {MANY_ROWS_PER_EXPERT} rows an expert")
    return Choice("hf_moe_triton", "fused kernels need no permuted copies")


@torch.compiler.assume_constant_result
def rows_matter(device: torch.device) -> bool:
    """Whether the number of rows decides: torch's grouped product is one kernel (SM90, SM100) rather than a loop."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def has_many_rows(top_k_index: Tensor, weight: Tensor) -> bool:
    """Whether an expert gets `MANY_ROWS_PER_EXPERT` or more on average, if that decides anything; never symbolic."""
    # an exported program is one for all lengths
    if not rows_matter(weight.device) or torch.compiler.is_exporting():
        return False
    # a branch, so that torch.compile guards on which side of the threshold the number is, not on the number
    if top_k_index.numel() >= MANY_ROWS_PER_EXPERT * weight.shape[0]:  # noqa: SIM103
        return True
    return False


def forward_of(name: str) -> Callable[[Any, Tensor, Tensor, Tensor], Tensor]:
    """The experts forward of the host's contract behind one of our names, which also takes low-rank factors."""

    def forward(
        experts: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        low_rank: LowRankPair | None = None,
    ) -> Tensor:
        weights = read_weights(experts)
        dtype, device = weights.down.dtype, weights.down.device
        many_rows = name == "hf_moe" and has_many_rows(top_k_index, weights.down)
        resolved = resolve(name, experts, dtype, device, many_rows, low_rank is not None)
        if resolved in HOST_REFUSALS:
            return _host_forward(resolved)(experts, hidden_states, top_k_index, top_k_weights)
        routing = (hidden_states, top_k_index, top_k_weights)
        if resolved == "hf_moe_reference":
            return _reference_forward(experts, *routing, low_rank=low_rank)
        factors = None if low_rank is None else low_rank.to(dtype)
        return run_experts(ENGINES[resolved], experts, weights, *routing, factors)

    forward.__name__ = f"{name}_forward"
    return forward


def _reference_forward(experts: Any, *routing: Tensor, low_rank: LowRankPair | None) -> Tensor:
    if low_rank is not None:
        raise ValueError(f"accelerated adapters cannot run: {ADAPTERS_NEED_PLAIN.format(foreign_storage(experts))}")
    return reference_forward(experts, *routing)


def _host_forward(name: str) -> Callable[..., Tensor]:
    # here, because registration imports this file as soon as the registry is there
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS[name]


@torch.compiler.assume_constant_result  # torch.compile takes the answer; it cannot trace the question
def resolve(
    name: str, experts: nn.Module, dtype: torch.dtype, device: torch.device, many_rows: bool, adapted: bool
) -> str:
    """The key in `ENGINES` or `HOST_REFUSALS` of what runs `name`; the choice of `hf_moe` is said once for each kind.

    Raises:
        ValueError: If `name` was asked for and cannot run `experts`.
    """
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return _for_onnx(name, adapted)
    if name == "hf_moe":
        choice = _loadable_choice(experts, dtype, device, many_rows, adapted)
        _say(type(experts).__name__, str(dtype).removeprefix("torch."), device.type, choice)
        name = choice.name
    elif (reason := REFUSALS[name](experts, dtype, device) or _load_cpu(name)) is not None:
        raise ValueError(f"experts_implementation={name!r} cannot run {type(experts).__name__}: {reason}")
    if name == "hf_moe_grouped" and has_grouped_mm(expert_shape(experts), dtype, device):
        name = name if triton_refuses(experts, dtype, device) else "hybrid"
    _load(name)
    return name


def _for_onnx(name: str, adapted: bool) -> str:
    """What is exported in the place of `name`: ONNX knows no operator of ours."""
    if name == "hf_moe" and not adapted:
        logger.info("ONNX gets the experts as 'batched_mm' computes them.")
        return "batched_mm"
    merge = " Merge the adapters before." if adapted else ""
    raise ValueError(
        f"experts_implementation={name!r} cannot be exported to ONNX: call "
        f"model.set_experts_implementation('batched_mm') before torch.onnx.export.{merge}"
    )


def _loadable_choice(
    experts: nn.Module, dtype: torch.dtype, device: torch.device, many_rows: bool, adapted: bool
) -> Choice:
    """`choose`, and again without the CPU kernels if a compiler is there but fails."""
    choice = choose(experts, dtype, device, many_rows, adapted)
    return choice if _load_cpu(choice.name) is None else choose(experts, dtype, device, many_rows, adapted)


def _load_cpu(name: str) -> str | None:
    """Load the engine if it is the CPU kernels; why that fails, which `cpu_refuses` says from then on."""
    if name != "hf_moe_cpu":
        return None
    try:
        _load(name)
    except RuntimeError as error:
        _BROKEN[name] = str(error)
    return _BROKEN.get(name)


@functools.cache  # says it once
def _say(experts_class: str, dtype: str, device: str, choice: Choice) -> None:
    level = logging.WARNING if choice.is_second_best else logging.INFO
    logger.log(level, "%s (%s, %s): %s", experts_class, dtype, device, choice)


ENGINES: dict[str, Engine] = {"hf_moe_grouped": Engine(grouped_linear)}
_BROKEN: dict[str, str] = {}  # engines that were there and could not be loaded, and why


def _load(name: str) -> None:
    """Import the engine. `hybrid` is `hf_moe_grouped` where Triton runs: its kernels between torch's products.

    Raises:
        RuntimeError: If the CPU kernels cannot be built.
    """
    if name in ENGINES:
        return
    if name == "hybrid":
        hybrid = importlib.import_module("hf_moe.kernels.triton.hybrid")
        ENGINES[name] = Engine(grouped_linear, hybrid.triton_hybrid_experts)
    elif name == "hf_moe_cpu":
        importlib.import_module("hf_moe.kernels.cpu.build").load_kernels()
        ops = importlib.import_module("hf_moe.kernels.cpu.ops")
        lora = importlib.import_module("hf_moe.kernels.cpu.low_rank")
        ENGINES[name] = Engine(ops.cpu_grouped_linear, ops.cpu_experts, lora.cpu_experts_lora)
    elif name == "hf_moe_triton":
        ops = importlib.import_module("hf_moe.kernels.triton.ops")
        ENGINES[name] = Engine(ops.triton_grouped_linear, ops.triton_experts, ops.triton_experts_lora)
