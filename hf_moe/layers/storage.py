"""Storage of the matrices of one layer's experts, and products of rows with them.

The pipeline owns tokens: their order, their weights, adapters. A storage owns matrices: dense tensors of the module, 4
bits, a file. A quantiser or an offloader attaches one, `experts.expert_storage = ...`; without it the module's own
tensors are the storage, as they are in this call: parallel wrappers and PEFT change them between calls.

Who attaches one answers for the rest of the module too. `to`, `state_dict` and `save_pretrained` see the parameters
that stand in the weights' places, and the storage only if it is a module. Transformers' own backends read those
parameters whatever they hold. torch.compile traces `linear` and `prefetch`: loops over the experts that have rows must
be kept out of it, as `linear_by_expert` is.

Shape suffixes: N routed rows in expert order, E experts, A and B the widths that a projection maps from and to.
"""

from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from hf_moe.kernels.layer_call import ExpertWeights
from hf_moe.layers.expert_rows import Plan, Projection
from hf_moe.layers.fp8_storage import fp8_storage, is_scaled
from hf_moe.layers.geometry import parametrization_of, up_name
from hf_moe.layers.packed_storages import (
    ParametrizedStorage,
    Stacks,
    SubclassStorage,
    UnreadableStorage,
    is_subclass_with_own_values,
)

__all__ = ["DENSE_DTYPES", "DenseStorage", "ExpertStorage", "Plan", "Projection", "attached_storage", "storage_of"]

DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ExpertStorage(Protocol):
    """The matrices of one layer's experts, and what multiplies rows by them."""

    @property
    def format(self) -> str:
        """Word for the form: "dense" for plain tensors. Fused operators are found by it, and messages name it."""

    @property
    def num_experts(self) -> int:
        """Of this process."""

    @property
    def dtype(self) -> torch.dtype:
        """Rows have it, and products are computed in it."""

    @property
    def device(self) -> torch.device:
        """Rows are there."""

    def shape(self, projection: Projection) -> tuple[int, int]:
        """`(B, A)`, out and in, whatever the layout in memory; no value is read."""

    def nbytes(self) -> dict[str, int]:
        """Bytes by place: a device, "disk"."""

    def linear(self, rows_NA: Tensor, projection: Projection, plan: Plan) -> Tensor:
        """Every row times the matrix of its expert, plus its bias.

        Touches experts that have rows alone. Differentiable in the rows, and in matrices and biases if they are
        trained; what it unpacks, the backward unpacks again.

        Args:
            rows_NA: In expert order, in `dtype`.
            plan: Of the rows.

        Returns:
            `[N, B]`, zero for rows after the last expert's.
        """

    def tensors(self) -> ExpertWeights | None:
        """All matrices as they are stored, for fused operators and merges; None if they are not stored densely."""

    def operands(self) -> Any:
        """What fused operators for `format` read, the `experts` of their `LayerCall`; asked where there is one alone.

        None: nothing at present, so that the layer runs step by step over `linear`. Dense ones read `tensors()`.
        """

    def prefetch(self, plan: Plan) -> None:
        """Begin to fetch what `linear` will read, if it is elsewhere."""


class DenseStorage(Stacks):
    """Matrices that are dense tensors; `linear` is for the reference, backends bring their own products."""

    __slots__ = ()

    @property
    def format(self) -> str:
        return "dense"

    def tensors(self) -> ExpertWeights:
        return self.weights

    def operands(self) -> ExpertWeights:
        return self.weights


def attached_storage(experts: nn.Module) -> Any:
    """The storage that a quantiser or an offloader attached, an object or a module of its own; None without one."""
    found = experts.__dict__.get("expert_storage")
    return experts._modules.get("expert_storage") if found is None else found


def storage_of(experts: Any) -> ExpertStorage:
    """The storage of an experts module's matrices, as it is now.

    Args:
        experts: A module under transformers' `use_experts_implementation` decorator.

    Returns:
        What was attached as `experts.expert_storage`; else the module's own tensors: dense, fp8, computed by a
        parametrisation, of a tensor class that packs its values, or, of another kind, a storage that names it and
        multiplies nothing.

    Raises:
        ValueError: If something parametrises the module's own tensors while a storage is attached or they are fp8, as
            PEFT does in the forward of an adapter that is not accelerated: it would have no effect.
    """
    attached = attached_storage(experts)
    up, down = up_name(experts), "down_proj"
    if "parametrizations" in experts._modules:
        form = "fp8" if is_scaled(experts) else None if attached is None else attached.format
        if form is not None and any(parametrization_of(experts, name) is not None for name in (up, down)):
            raise ValueError(
                f"the weights are stored as {form}, so what parametrises the module's own tensors has no "
                "effect: call hf_moe.accelerate_adapters(model) for LoRA on experts."
            )
        if attached is None and _is_computed(experts, up, down):
            return ParametrizedStorage(experts)
    if attached is not None:
        return attached
    if is_scaled(experts):
        return fp8_storage(experts)
    up_weight, weight = _read(experts, up), _read(experts, down)
    if not _is_stack(up_weight) or not _is_stack(weight):
        return UnreadableStorage(experts, weight)
    weights = ExpertWeights(
        up_weight,
        _read(experts, f"{up}_bias") if experts.has_bias else None,
        weight,
        _read(experts, "down_proj_bias") if experts.has_bias else None,
    )
    if not (type(weight) is type(up_weight) is nn.Parameter) and any(map(is_subclass_with_own_values, weights)):
        return SubclassStorage(weights, experts.is_transposed)
    return DenseStorage(weights, experts.is_transposed)


def _read(experts: nn.Module, name: str) -> Any:
    # most often a plain parameter: looked up where it is, it costs a tenth of what the module's attribute costs
    parameter = experts._parameters.get(name)
    return getattr(experts, name, None) if parameter is None else parameter


def _is_stack(weight: Any) -> TypeGuard[Tensor]:
    return isinstance(weight, Tensor) and weight.dim() == 3 and weight.dtype in DENSE_DTYPES


def _is_computed(experts: nn.Module, *names: str) -> bool:
    """Tell whether a parametrisation gives one of the weights; PEFT's `W + BA` does not count: it is dense."""
    lists = [entry for name in names if (entry := parametrization_of(experts, name)) is not None]
    return any(not type(each).__module__.startswith("peft.") for entry in lists for each in entry)
