"""Fused operators of a layer as torch ops: a pair of custom ops, forward and backward, opaque to torch.compile.

Both take a call in its flat form (layer_call). The forward op also returns what backward needs, if that is kept. The
backward op gets a list of what is wanted and returns these gradients only: a frozen base costs no weight gradient.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef

from .layer_call import ADAPTED_CALL, CALL, NO_FP8_GRADIENT, LayerCall, LowRank, flatten, unflatten


class Wants(NamedTuple):
    """The wanted gradients of a layer, by the names that CALL has, in the order in which they are returned."""

    hidden: bool
    weights: bool
    up_weight: bool
    up_bias: bool
    down_weight: bool
    down_bias: bool


class AdapterWants(NamedTuple):
    """The same for a layer with adapters, whose base is frozen, by the names that ADAPTED_CALL has."""

    hidden: bool
    weights: bool
    up_a: bool
    up_b: bool
    down_a: bool
    down_b: bool


class LayerOp:
    """A differentiable operator of a layer, registered with torch under a name and the name with `_backward`.

    Args:
        name: With its namespace.
        define: Makes a custom op of a name, a function and a schema.
        Kept: A NamedTuple of the tensors that forward keeps for backward.
        forward: `(call, keep) -> (out_TH, kept)`; the kept tensors are empty without `keep`.
        backward: `(grad_out_TH, call, kept, wants) -> gradients`, the wanted ones alone.
        kept_like: `(call, keep) -> kept`, memory of the shapes and dtypes that forward returns.
        adapted: Whether calls bring adapters: `wants` is then an AdapterWants, else a Wants.
    """

    def __init__(
        self,
        name: str,
        define: Callable[[str, Callable, str], CustomOpDef],
        Kept: Any,
        *,
        forward: Callable[[LayerCall, bool], tuple[Tensor, Any]],
        backward: Callable[[Tensor, LayerCall, Any, Any], list[Tensor]],
        kept_like: Callable[[LayerCall, bool], Any],
        adapted: bool = False,
    ):
        self._Kept, self._forward, self._backward, self._kept_like = Kept, forward, backward, kept_like
        self._Wants: Any = AdapterWants if adapted else Wants
        arguments = (ADAPTED_CALL if adapted else CALL).split(", ")
        names = [argument.split()[-1] for argument in arguments]
        self._places = [names.index(name) for name in self._Wants._fields]
        self._scale = names.index("up_weight_scale")
        self._values = [
            place for place, name in enumerate(self._Wants._fields) if name in ("up_weight", "down_weight")
        ]
        self._num_tensors = sum(argument.startswith("Tensor") for argument in arguments)
        self._define(name, define, ", ".join(arguments))

    def _define(self, name: str, define: Callable[[str, Callable, str], CustomOpDef], call: str) -> None:
        outputs = ", ".join(["Tensor"] * (1 + len(self._Kept._fields)))
        kept = ", ".join(f"Tensor {field}" for field in self._Kept._fields)
        forward = define(name, self._run_forward, f"({call}, bool keep) -> ({outputs})")
        backward = define(
            f"{name}_backward", self._run_backward, f"(Tensor grad_out, {kept}, {call}, bool[] wants) -> Tensor[]"
        )
        forward.register_fake(self._fake_forward)
        backward.register_fake(self._fake_backward)
        forward.register_autograd(self._differentiate, setup_context=self._keep)
        namespace, op = name.split("::")
        ops = getattr(torch.ops, namespace)  # called as they are: torch's wrapper costs time
        self._forward_op, self._backward_op = getattr(ops, op).default, getattr(ops, f"{op}_backward").default

    def __call__(self, call: LayerCall) -> Tensor:
        """Run the forward op, keeping what backward needs where a gradient will be wanted.

        Raises:
            ValueError: If the base under an adapter requires grad.
        """
        flat, keep = flatten(call), False
        if torch.is_grad_enabled():
            if call.low_rank is not None:
                _require_frozen(call)
            keep = any(tensor is not None and tensor.requires_grad for tensor in flat[: self._num_tensors])
        return self._forward_op(*flat, keep)[0]

    def _run_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        out_TH, kept = self._forward(unflatten(arguments[:-1]), arguments[-1])
        return out_TH, *kept

    def _fake_forward(self, *arguments: Any) -> tuple[Tensor, ...]:
        call = unflatten(arguments[:-1])
        return call.hidden_TH.new_empty(call.hidden_TH.shape), *self._kept_like(call, arguments[-1])

    def _run_backward(self, grad_out_TH: Tensor, *arguments: Any) -> list[Tensor]:
        num_kept = len(self._Kept._fields)
        kept, call, wants = arguments[:num_kept], unflatten(arguments[num_kept:-1]), self._Wants(*arguments[-1])
        return self._backward(grad_out_TH, call, self._Kept(*kept), wants)

    def _fake_backward(self, grad_out_TH: Tensor, *arguments: Any) -> list[Tensor]:
        return gradients_like(unflatten(arguments[len(self._Kept._fields) : -1]), arguments[-1])

    def _keep(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *inputs[: self._num_tensors])
        *ctx.settings, ctx.kept = inputs[self._num_tensors :]
        ctx.is_scaled = inputs[self._scale] is not None

    def _differentiate(self, ctx: Any, grad_out_TH: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad_out_TH is not None:
            if not ctx.kept:  # an exported program may run this way; nothing can differentiate it
                raise RuntimeError(
                    "This op keeps nothing for backward with keep=False: call it with keep=True, or in no_grad."
                )
            wants = [ctx.needs_input_grad[place] for place in self._places]
            if ctx.is_scaled and any(wants[place] for place in self._values):
                raise ValueError(NO_FP8_GRADIENT)
            found = iter(self._backward_op(grad_out_TH, *ctx.saved_tensors, *ctx.settings, wants))
            for place, wanted in zip(self._places, wants, strict=True):
                gradients[place] = next(found) if wanted else None
        return tuple(gradients)


def gradients_like(call: LayerCall, wants: Iterable[bool]) -> list[Tensor]:
    """Memory for the wanted gradients."""
    pairs = zip(_trained(call), wants, strict=True)
    return [tensor.new_empty(tensor.shape) for tensor, wanted in pairs if wanted and tensor is not None]


def _trained(call: LayerCall) -> tuple[Tensor | None, ...]:
    """The tensors that have a gradient, in the order of Wants or AdapterWants."""
    if call.low_rank is None:
        return call.hidden_TH, call.weights_TK, *call.experts[:4]
    factors = [tensor for pair in call.low_rank for tensor in (pair[:2] if pair is not None else (None, None))]
    return call.hidden_TH, call.weights_TK, *factors


def _require_frozen(call: LayerCall) -> None:
    names = ("up_weight", "up_bias", "down_weight", "down_bias")
    pairs = zip(names, call.experts[:4], strict=True)
    trained = ", ".join(name for name, tensor in pairs if tensor is not None and tensor.requires_grad)
    if trained:
        raise ValueError(
            f"The base under an adapter is frozen, but {trained} requires grad: call requires_grad_(False)."
        )


def require_factors(call: LayerCall) -> None:
    """Refuse adapters whose shapes do not fit the experts.

    Raises:
        ValueError: With the shapes that are needed.
    """
    for name, weight, factors in zip(
        ("up", "down"), (call.experts.up, call.experts.down), call.low_rank or (), strict=False
    ):
        if factors is not None:
            _require_fit(name, weight.transpose(1, 2) if call.form.transposed else weight, factors)


def _require_fit(name: str, weight_EBA: Tensor, factors: LowRank) -> None:
    num_experts, out, inner = weight_EBA.shape
    got = [None if factor is None else tuple(factor.shape) for factor in factors[:2]]
    rank = got[0][1] if got[0] is not None and len(got[0]) == 3 else 0
    if rank < 1 or got != [(num_experts, rank, inner), (num_experts, out, rank)]:
        raise ValueError(
            f"{name}_a must be [{num_experts}, R, {inner}] and {name}_b [{num_experts}, {out}, R] with R >= 1, or "
            f"both None, got {got[0]} and {got[1]}."
        )
