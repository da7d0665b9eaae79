"""Names and logical shapes of an experts module's matrices, whatever stores them; no value is read.

Shape suffixes: E experts, H hidden size, I expert width, P pre-activation width (2I gated, I ungated).
"""

from math import prod
from typing import Any, NamedTuple

from torch import nn

from hf_moe.layers.expert_rows import Projection


class GeometryError(ValueError):
    """Neither the weights nor the module tell how large the experts are."""


class Geometry(NamedTuple):
    """Sizes of the experts of one module.

    Attributes:
        num_experts: Of this process.
        hidden_size: H.
        expert_width: I.
    """

    num_experts: int
    hidden_size: int
    expert_width: int


def up_name(experts: Any) -> str:
    """The parameter of the first projection."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def projection_name(experts: Any, projection: Projection) -> str:
    """The parameter of a projection."""
    return up_name(experts) if projection == "up" else "down_proj"


def parametrization_of(experts: nn.Module, name: str) -> Any:
    """The `ParametrizationList` that computes a parameter (`torch.nn.utils.parametrize`); None without one."""
    lists: Any = experts._modules.get("parametrizations")
    return lists[name] if lists is not None and name in lists else None


def geometry_of(experts: Any) -> Geometry:
    """Sizes from the shapes of the weights, else from what the module declares.

    Of each weight only dimension 1 is read: formats that pack several values into one element shorten the last.

    Raises:
        GeometryError: If neither tells.
    """
    up, down = _logical_shape(experts, up_name(experts)), _logical_shape(experts, "down_proj")
    num_experts = declared_size(experts, "num_experts")
    if up and down and up[0] == down[0]:
        hidden_size, expert_width = down[1], up[1] // (2 if experts.has_gate else 1)
        if experts.is_transposed:
            hidden_size, expert_width = up[1], down[1]
        return Geometry(up[0] if num_experts is None else num_experts, hidden_size, expert_width)
    declared_hidden = declared_size(experts, "hidden_dim") or declared_size(experts, "hidden_size")
    declared_width = declared_size(experts, "intermediate_dim") or declared_size(experts, "intermediate_size")
    if num_experts is None or declared_hidden is None or declared_width is None:
        raise GeometryError(
            f"their weights have no shape [experts, rows, columns] (found {up} and {down}), and the module lacks one "
            "of the integers num_experts, hidden_dim, intermediate_dim. Set them on the module that holds the "
            "quantised weights."
        )
    return Geometry(num_experts, declared_hidden, declared_width)


def declared_size(module: nn.Module | None, name: str) -> int | None:
    """An integer attribute of the module itself; None if it has none of this name."""
    value = None if module is None else vars(module).get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _logical_shape(experts: nn.Module, name: str) -> tuple[int, ...] | None:
    """Shape `[E, rows, columns]` of a weight that may be parametrised or replaced; None if it is stored otherwise.

    The attribute itself is not read where a parametrisation stands behind it: that may unpack gigabytes.
    """
    owners: list[Any]
    if (parametrization := parametrization_of(experts, name)) is not None:
        stored, owners = getattr(parametrization, "original", None), list(parametrization)
    else:
        stored = experts._parameters.get(name)
        stored = experts._buffers.get(name, vars(experts).get(name)) if stored is None else stored
        owners = [stored]
    # bitsandbytes flattens what it packs; its quantisation state keeps the shape
    states = [getattr(owner, "quant_state", None) for owner in owners]
    for shape in (getattr(item, "shape", None) for item in [*states, stored]):
        if shape is not None and len(shape) == 3 and prod(shape) > 0:
            return tuple(shape)
    return None
