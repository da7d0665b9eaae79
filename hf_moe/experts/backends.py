"""Every backend that `experts_implementation` may name, in one table, and what `hf_moe` chooses of it.

From a name to the forward behind it: the table, the choice for a request, the row that runs, the call.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_moe.experts.own_backends import OWN, has_many_rows
from hf_moe.experts.pipeline import Operators, run_experts
from hf_moe.experts.reference import run_reference
from hf_moe.experts.request import Backend, Request
from hf_moe.experts.transformers_backends import TRANSFORMERS, delegates
from hf_moe.kernels.layer_call import LowRankPair
from hf_moe.layers.packed_storages import UnreadableStorage
from hf_moe.layers.storage import ExpertStorage, storage_of

logger = logging.getLogger(__name__)

HF_MOE, REFERENCE = "hf_moe", "hf_moe_reference"
# the table
ROWS = (
    Backend(HF_MOE, takes_low_rank=True),  # runs one of the others
    *OWN,
    Backend(REFERENCE),
    *TRANSFORMERS,
)
BACKENDS: dict[str, Backend] = {row.public_name: row for row in ROWS}
OURS = tuple(name for name in BACKENDS if name.startswith(HF_MOE))
_ROWS_OF = {name: [row for row in ROWS if row.public_name == name] for name in BACKENDS}
OPERATORS: dict[str, Operators] = {}  # of the rows that were loaded
_BROKEN: dict[str, str] = {}  # rows that were there and could not be loaded, and why


class Choice(NamedTuple):
    """The choice of `hf_moe`: a backend's name, why, and whether a better one had to be passed over."""

    name: str
    reason: str
    is_second_best: bool = False

    def __str__(self) -> str:
        return f"hf_moe runs {self.name}: {self.reason.rstrip('.')}."


def choose(request: Request) -> Choice:
    """Choose what `hf_moe` runs.

    Raises:
        ValueError: If nothing of ours reads the weights.
    """
    return _chosen(request)[1]


def _chosen(request: Request) -> tuple[Backend, Choice]:
    """The row, and its choice in words."""
    # by the same names transformers runs other kernels for fp8
    is_delegable = not request.adapted and request.device.type != "cpu" and request.format != "fp8"
    for name in delegates() if is_delegable else ():
        if refusal(row := BACKENDS[name], request) is None:
            return row, Choice(name, "HF_MOE_DELEGATE allows transformers' kernel")
    passed_over = None
    for row in ROWS:
        if (merit := row.suits(request)) is None:
            continue
        if (reason := refusal(row, request)) is None:
            return row, Choice(row.public_name, passed_over or merit, passed_over is not None)
        passed_over = passed_over or reason
    raise ValueError(f"experts_implementation='hf_moe' cannot run {type(request.experts).__name__}: {passed_over}")


def refusal(row: Backend, request: Request) -> str | None:
    """Why a row cannot run a request, as a sentence that ends with a way out."""
    if request.format != "dense":
        if row.name in OURS and isinstance(storage := storage_of(request.experts), UnreadableStorage):
            return storage.reason
        if row.takes is not None and request.format not in row.takes:
            return f"{row.public_name} has no operators for weights stored as {request.format}: use 'hf_moe_grouped'."
    return row.refuses(request) or _BROKEN.get(row.name)


def available_backends() -> list[str]:
    """Names that the installed transformers accepts; `BACKENDS` knows all but those that others registered."""
    # here, because registration imports this file as soon as the registry is there
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ["eager", *ALL_EXPERTS_FUNCTIONS.keys()]


def refusals(request: Request) -> dict[str, str]:
    """Backends that cannot run a request, with the reason; those that can are absent.

    On the meta device only CUDA kernels are refused.
    """
    reasons = {name: refusal(BACKENDS[name], request) for name in available_backends() if name in BACKENDS}
    return {name: reason for name, reason in reasons.items() if reason is not None}


@torch.compiler.assume_constant_result  # torch.compile takes the answer; it cannot trace the question
def resolve(name: str, *request_fields: Any) -> str:
    """The row that runs `name`, loaded; the choice of `hf_moe` is logged once for each kind.

    Args:
        request_fields: Of a `Request`, one by one, since the compiler makes no constant of a record.

    Raises:
        ValueError: If `name` was asked for and cannot run the request.
    """
    request = Request(*request_fields)
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return _for_onnx(name, request.adapted)
    if name == HF_MOE:
        row, choice = _chosen(request)
        while _load_error(row) is not None:  # a compiler is there but fails: again, knowing that
            row, choice = _chosen(request)
        _log_choice(type(request.experts).__name__, request.dtype, request.device.type, choice)
        return row.name
    for row in _ROWS_OF[name]:
        reason = refusal(row, request) or _load_error(row)
        if reason is None:
            return row.name
    raise ValueError(f"experts_implementation={name!r} cannot run {type(request.experts).__name__}: {reason}")


def _load_error(row: Backend) -> str | None:
    """Load a row's operators; why that fails, which `refusal` says from then on."""
    if row.load is not None and row.name not in OPERATORS:
        try:
            OPERATORS[row.name] = row.load()
        except RuntimeError as error:
            _BROKEN[row.name] = str(error)
    return _BROKEN.get(row.name)


def _for_onnx(name: str, adapted: bool) -> str:
    """The row that is exported in the place of `name`: ONNX knows no operator of ours."""
    if name == HF_MOE and not adapted:
        logger.info("ONNX gets the experts as 'batched_mm' computes them.")
        return "batched_mm"
    merge = " Merge the adapters before." if adapted else ""
    raise ValueError(
        f"experts_implementation={name!r} cannot be exported to ONNX: call "
        f"model.set_experts_implementation('batched_mm') before torch.onnx.export.{merge}"
    )


@functools.cache  # once
def _log_choice(experts_class: str, dtype: torch.dtype, device: str, choice: Choice) -> None:
    level = logging.WARNING if choice.is_second_best else logging.INFO
    logger.log(level, "%s (%s, %s): %s", experts_class, str(dtype).removeprefix("torch."), device, choice)


def forward_of(name: str) -> Callable[..., Tensor]:
    """The experts forward of transformers' contract behind one of our names, which also takes low-rank factors."""

    def forward(
        experts: Any,
        hidden_states: Tensor,
        top_k_index: Tensor,
        top_k_weights: Tensor,
        low_rank: LowRankPair | None = None,
    ) -> Tensor:
        storage = storage_of(experts)
        dtype, device, adapted = storage.dtype, storage.device, low_rank is not None
        many_rows = name == HF_MOE and has_many_rows(top_k_index.numel(), storage.num_experts, dtype, device, adapted)
        row = resolve(name, experts, storage.format, dtype, device, storage.shape("down"), many_rows, adapted)
        return run_row(row, experts, storage, hidden_states, top_k_index, top_k_weights, low_rank)

    forward.__name__ = f"{name}_forward"
    return forward


def run_row(
    row: str,
    experts: Any,
    storage: ExpertStorage,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    low_rank: LowRankPair | None = None,
) -> Tensor:
    """Run experts on what `resolve` found; arguments and result as `run_experts`."""
    if row in OPERATORS:
        factors = None if low_rank is None else low_rank.to(storage.dtype)
        return run_experts(OPERATORS[row], experts, storage, hidden_states, top_k_index, top_k_weights, factors)
    if low_rank is not None:
        raise ValueError(f"{row} takes no low-rank factors: use 'hf_moe'.")
    if row == REFERENCE:
        return run_reference(experts, storage, hidden_states, top_k_index, top_k_weights)
    # here, because registration imports this file as soon as the registry is there
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    return ALL_EXPERTS_FUNCTIONS[row](experts, hidden_states, top_k_index, top_k_weights)
