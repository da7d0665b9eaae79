"""Parameters that a tensor's gradient flows into, by the graph that computed it."""

from collections.abc import Iterator

from torch import Tensor


def graph_leaves(output: Tensor) -> Iterator[Tensor]:
    """The leaves of the graph of `output`, each once, as they are found; no gradient is computed."""
    pending, seen = [output.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the node that adds to a leaf's gradient
            yield node.variable
        pending += [following for following, _ in node.next_functions]
