"""Transformers' experts contract: the flags and the activation of a module, its weights aside.

The decorator `use_experts_implementation` puts flags on the module (`has_gate`, `has_bias`, `is_transposed`,
`is_concatenated`, `has_post_expert_norm`, `_is_expert_parallel`). Weights are the matter of `layers.storage`.
"""

import weakref
from typing import Any

import torch
from torch import nn

from hf_moe.experts.activation import ExpertActivation, find_activation
from hf_moe.layers.skipped_slots import may_skip_slots

_OF_PROJECTIONS = tuple(f"_proj{suffix}" for suffix in ("", "_bias", "_scale_inv", "_activation_scale"))


def has_post_expert_norm(experts: nn.Module) -> bool:
    return getattr(experts, "has_post_expert_norm", False)  # the flag is younger than transformers 5.17


def num_expert_ids(experts: Any, num_experts: int) -> int:
    """Ids of the router must be smaller: where slots may be skipped, the id `num_experts` marks them.

    Where nothing says so (transformers 5.17) any experts may get such ids.
    """
    return num_experts if may_skip_slots(experts) is False else num_experts + 1


def has_custom_gate(experts: nn.Module) -> bool:
    """Whether the class brings an `_apply_gate` of its own, instead of `act_fn(gate) * up` from the decorator."""
    # the decorator writes its own into the class body, so the function's home tells
    return type(experts)._apply_gate.__module__ != "transformers.integrations.moe"  # type: ignore[attr-defined]


def _holds_other_tensors(experts: nn.Module) -> bool:
    """Whether the module itself has tensors beside projections, their biases and their scales."""
    own = [name for kind in ("_parameters", "_buffers") for name in vars(experts).get(kind, ())]
    return any(not name.endswith(_OF_PROJECTIONS) for name in own)


_known_activations: "weakref.WeakKeyDictionary[nn.Module, tuple[Any, ExpertActivation | None]]" = (
    weakref.WeakKeyDictionary()
)


@torch.compiler.assume_constant_result  # torch.compile takes the answer; it cannot trace the question
def activation_of(experts: nn.Module) -> ExpertActivation | None:
    """`find_activation`, asked again only if the activation or a number on the module was replaced."""
    if has_custom_gate(experts) and _holds_other_tensors(experts):
        return None  # it may use them, and training may change them
    own = vars(experts)
    act_fn = own.get("act_fn") or own["_modules"].get("act_fn")
    state = (act_fn, [value for value in own.values() if type(value) in (int, float)])
    known = _known_activations.get(experts)
    if known is None or known[0] != state:
        known = (state, find_activation(experts))
        _known_activations[experts] = known
    return known[1]
