"""What the host's experts contract says of a module.

The host's decorator `use_experts_implementation` puts flags on the module (`has_gate`, `has_bias`, `is_transposed`,
`is_concatenated`, `has_post_expert_norm`, `_is_expert_parallel`). Parallel wrappers and PEFT change the tensors
between calls, so nothing of them is kept.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe.experts.activation import Gate, find_gate
from hf_moe.kernels.layer_call import ExpertWeights


def up_name(experts: Any) -> str:
    """The parameter of the first projection."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def read_weights(experts: Any) -> ExpertWeights:
    """The tensors as the module gives them now; a parametrised weight is computed, once."""
    up = up_name(experts)
    return ExpertWeights(
        up=getattr(experts, up),
        up_bias=getattr(experts, f"{up}_bias") if experts.has_bias else None,
        down=experts.down_proj,
        down_bias=experts.down_proj_bias if experts.has_bias else None,
    )


def expert_shape(experts: nn.Module) -> tuple[int, ...]:
    """`(rows, columns)` of one expert's down projection: its two widths in either layout; () if not stored densely."""
    weight = experts._parameters.get("down_proj")
    return tuple(weight.shape[1:]) if weight is not None and weight.dim() == 3 else ()


def foreign_storage(experts: Any) -> str | None:
    """The class of weights that hold their values in a form of their own (torchao), which no operator of ours reads.

    Classes of torch itself are no storage: they trace or distribute, and a forward gets plain tensors out of them.
    """
    for name in (up_name(experts), "down_proj"):
        kind = type(experts._parameters.get(name))
        dispatches = getattr(kind, "__torch_dispatch__", Tensor.__torch_dispatch__) is not Tensor.__torch_dispatch__
        if dispatches and not kind.__module__.startswith("torch."):
            return kind.__name__
    return None


def has_post_expert_norm(experts: nn.Module) -> bool:
    return getattr(experts, "has_post_expert_norm", False)  # the flag is younger than transformers 5.17


def num_expert_ids(experts: Any, num_experts: int) -> int:
    """Ids of the router must be smaller: under expert parallelism `num_experts` marks what other processes compute.

    The flag is younger than transformers 5.17, where any experts may get such ids.
    """
    return num_experts + 1 if getattr(experts, "_is_expert_parallel", True) else num_experts


def has_custom_gate(experts: nn.Module) -> bool:
    """Whether the class brings an `_apply_gate` of its own, instead of `act_fn(gate) * up` from the decorator."""
    # the decorator writes its gate into the class body, so the function's home tells
    return type(experts)._apply_gate.__module__ != "transformers.integrations.moe"  # type: ignore[attr-defined]


def _holds_other_tensors(experts: nn.Module) -> bool:
    """Whether the module itself has tensors beside projections and their biases."""
    own = [*experts._parameters, *experts._buffers]
    return any(not name.removesuffix("_bias").endswith("_proj") for name in own)


_known_gates: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, Gate | None]]" = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result  # torch.compile takes the answer; it cannot trace the question
def gate_of(experts: nn.Module) -> Gate | None:
    """`find_gate`, asked again only if the activation or a number on the module was replaced."""
    if has_custom_gate(experts) and _holds_other_tensors(experts):
        return None  # the gate may use them, and training may change them
    state = (
        getattr(experts, "act_fn", None),
        [value for value in vars(experts).values() if type(value) in (int, float)],
    )
    known = _known_gates.get(experts)
    if known is None or known[0] != state:
        known = (state, find_gate(experts))
        _known_gates[experts] = known
    return known[1]
