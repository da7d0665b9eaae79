"""One linear map per expert as torch ops: a pair of custom ops, forward and backward, opaque to torch.compile.

Shape suffixes: N routed rows, E experts, A and B the input and output width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor
from torch.library import CustomOpDef

FORWARD = "(Tensor rows, Tensor weight, Tensor? bias, Tensor expert_end, bool transposed) -> Tensor"
BACKWARD = (
    "(Tensor grad_out, Tensor rows, Tensor weight, Tensor expert_end, bool transposed, bool[] wants) -> Tensor[]"
)


class LinearWants(NamedTuple):
    """The wanted gradients, in the order in which they are returned."""

    rows: bool
    weight: bool
    bias: bool


def define_linear_op(
    name: str,
    define: Callable[[str, Callable, str], CustomOpDef],
    forward: Callable[..., Tensor],
    backward: Callable[..., list[Tensor]],
) -> CustomOpDef:
    """Register a differentiable linear map under a name, and its gradient under the name with `_backward`.

    Args:
        name: With its namespace.
        define: Makes a custom op of a name, a function and a schema.
        forward: `(rows_NA, weight, bias, expert_end_E, transposed) -> rows_NB`.
        backward: `(grad_NB, rows_NA, weight, expert_end_E, transposed, wants) -> gradients`, the wanted ones alone.
    """
    forward_op = define(name, forward, FORWARD)
    backward_op = define(f"{name}_backward", backward, BACKWARD)

    def differentiate(ctx: Any, grad_NB: Tensor) -> tuple[Tensor | None, ...]:
        rows_NA, weight, expert_end_E = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[:3])
        found = iter(backward_op(grad_NB, rows_NA, weight, expert_end_E, ctx.transposed, wants))
        return (*(next(found) if wanted else None for wanted in wants), None, None)

    forward_op.register_fake(_fake_forward)
    backward_op.register_fake(_fake_backward)
    forward_op.register_autograd(differentiate, setup_context=_keep)
    return forward_op


def _fake_forward(rows_NA, weight, bias, expert_end_E, transposed):
    return rows_NA.new_empty(rows_NA.shape[0], weight.shape[2 if transposed else 1])


def _fake_backward(grad_NB, rows_NA, weight, expert_end_E, transposed, wants):
    shapes = (rows_NA.shape, weight.shape, (weight.shape[0], grad_NB.shape[1]))
    return [rows_NA.new_empty(shape) for shape, wanted in zip(shapes, wants, strict=True) if wanted]


def _keep(ctx, inputs, output) -> None:
    rows_NA, weight, _, expert_end_E, ctx.transposed = inputs
    ctx.save_for_backward(rows_NA, weight, expert_end_E)
