"""What one launch multiplies and moves: from the tensors and sizes that it was recorded with, and uniform routing.

From memory, every tensor is read or written once, an expert's matrix if the expert has rows, and gathered rows again
as far as L2 does not hold the tokens. From L2, every program reads its operands. A kernel needs a line in FAMILIES.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .launches import Call
from .uniform import Routing

SECTOR = 32  # bytes: what an element costs whose neighbours in memory are not read with it


class Traffic(NamedTuple):
    """Work of one launch.

    Attributes:
        flops: On tensor cores, with the padding of tiles.
        hbm: Bytes from and to memory.
        l2: Bytes that multiprocessors read from L2.
        epilogue: Bytes of `hbm` that move after a program's products.
    """

    flops: float
    hbm: float
    l2: float
    epilogue: float = 0.0


class Arguments:
    """The recorded arguments of one launch; errors name the kernel."""

    def __init__(self, call: Call):
        self.kernel, self.programs, self.values = call.launch.kernel, call.programs, call.values
        # absent operands are another operand again
        self.tensors = {id(value): value for value in call.values.values() if isinstance(value, Tensor)}

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise KeyError(
                f"{self.kernel} has no argument {name}: mend its model in benchmarks/kernel_checks/traffic.py."
            )
        return self.values[name]

    def halves(self) -> bool:
        """Whether a last tile that is at most half full takes half the rows."""
        return self.values.get("HALVES", False)

    def nbytes(self, *names: str) -> int:
        """Bytes of the named tensors, each once."""
        tensors = {id(self[name]): self[name] for name in names}
        return sum(_nbytes(tensor) for tensor in tensors.values())

    def scales(self) -> tuple[str, ...]:
        """The name of the scales of fp8 weights; dense ones have none."""
        return ("weight_scale",) if self.values.get("SCALE_N", 0) else ()

    def require_known(self, *names: str) -> None:
        """Raise ValueError for a matrix by expert that the model of this kernel does not know."""
        known = {id(self[name]) for name in names}
        unknown = [name for name, value in self.values.items() if _is_by_expert(value) and id(value) not in known]
        if unknown:
            rule = f"{self.kernel} also reads {', '.join(unknown)}: count them in benchmarks/kernel_checks/traffic.py."
            raise ValueError(rule)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_by_expert(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3


def _element_cost(tensor: Tensor) -> int:
    """Bytes that L2 delivers for an element of a matrix."""
    return tensor.element_size() if 1 in tensor.stride()[-2:] else SECTOR


def _memory(arguments: Arguments, routing: Routing, matrices: tuple[str, ...], unread: tuple[str, ...] = ()) -> float:
    """Bytes of all tensors once, but of `matrices` only those of experts that have rows."""
    skipped = {id(arguments[name]) for name in (*matrices, *unread)}
    rest = sum(_nbytes(tensor) for key, tensor in arguments.tensors.items() if key not in skipped)
    return rest + routing.share_hit * arguments.nbytes(*matrices)


def _gathered_again(rows_TH: Tensor, routing: Routing, l2_bytes: float) -> float:
    """Bytes of gathered rows beyond one reading of all tokens: the share that L2 does not hold."""
    once = _nbytes(rows_TH)
    return (once * routing.slots - once) * max(0.0, 1 - l2_bytes / once)


@dataclass(frozen=True)
class Product:
    """Rows of every expert times its matrix, by the names that a kernel has for them.

    The instructions that convert fp8 are not counted: it is assumed that they run beside the products.

    Attributes:
        columns: The size that the column tiles cut; a gated matrix has twice as many columns.
        epilogue: What moves after the product.
    """

    rows: str
    matrix: str
    columns: str
    epilogue: tuple[str, ...]

    def __call__(self, arguments: Arguments, routing: Routing, l2_bytes: float) -> Traffic:
        rows_NA, matrix = arguments[self.rows], arguments[self.matrix]
        inner, column_tiles = rows_NA.shape[1], arguments.programs // arguments["num_tiles"]
        columns = matrix.numel() // (routing.experts * inner)
        padded = column_tiles * arguments["BLOCK_N"] * (columns // arguments[self.columns])
        rows = _Rows(arguments, routing, column_tiles)
        flops = rows.flops(padded, math.ceil(inner / arguments["BLOCK_K"]) * arguments["BLOCK_K"])
        l2, matrices = rows.l2(inner, columns, rows_NA, matrix), (self.matrix, *arguments.scales())
        l2 += rows.tiles * arguments.nbytes(*arguments.scales()) / routing.experts
        if arguments["HAS_LOW"]:
            low, rank = arguments["low_weight"], arguments["R"]
            flops += rows.flops(padded, max(rank, arguments["BLOCK_R"]))
            l2 += rows.l2(rank, columns, rows_NA, low)
            matrices = (*matrices, "low_weight")
        arguments.require_known(*matrices)
        hbm = _memory(arguments, routing, matrices)
        if arguments.values.get("GATHER", True):  # without that choice, a kernel always gathers
            hbm += _gathered_again(rows_NA, routing, l2_bytes)
        return Traffic(flops, hbm, l2, arguments.nbytes(*self.epilogue))


class _Rows:
    """The tiles of rows of a product: each meets every column tile."""

    def __init__(self, arguments: Arguments, routing: Routing, column_tiles: int):
        self.tiles, self.column_tiles = routing.tiles(arguments["BLOCK_M"]), column_tiles
        self.computed = routing.rows_with_padding(arguments["BLOCK_M"], arguments.halves())

    def flops(self, columns: int, inner: int) -> float:
        return 2.0 * self.computed * columns * inner

    def l2(self, inner: int, columns: int, rows_NA: Tensor, matrix: Tensor) -> float:
        """Bytes of the rows, which every column tile reads, and of the matrices, which every row tile reads."""
        of_rows = self.computed * self.column_tiles * rows_NA.element_size()
        return inner * (of_rows + self.tiles * columns * _element_cost(matrix))


def weight_gradient(arguments: Arguments, routing: Routing, l2_bytes: float) -> Traffic:
    """Every expert's rows of one operand times its rows of the other; tiles without rows write zeros."""
    left, right, out = arguments["left"], arguments["right"], arguments["out"]
    A, B, block_a, block_b = arguments["A"], arguments["B"], arguments["BLOCK_A"], arguments["BLOCK_B"]
    blocks_a, blocks_b = math.ceil(A / block_a), math.ceil(B / block_b)
    computed = routing.rows_with_padding(arguments["BLOCK_K"])
    arguments.require_known("out")
    hbm = _memory(arguments, routing, ())
    for operand, gathers in ((left, "GATHER_LEFT"), (right, "GATHER_RIGHT")):
        if arguments[gathers]:
            hbm += _gathered_again(operand, routing, l2_bytes)
    l2 = computed * (A * blocks_b + B * blocks_a) * left.element_size()
    return Traffic(2.0 * computed * blocks_a * block_a * blocks_b * block_b, hbm, l2, _nbytes(out))


def _decode(arguments: Arguments, routing: Routing, weight: str) -> Traffic:
    """Every slot reads its expert through L2; no tensor cores."""
    matrices = (weight, *arguments.scales())
    arguments.require_known(*matrices)
    hbm = _memory(arguments, routing, matrices)
    return Traffic(0.0, hbm, arguments.nbytes(*matrices) / routing.experts * routing.rows)


def decode_up(arguments: Arguments, routing: Routing, l2_bytes: float) -> Traffic:
    return _decode(arguments, routing, "up_weight")


def decode_down(arguments: Arguments, routing: Routing, l2_bytes: float) -> Traffic:
    return _decode(arguments, routing, "down_weight")


def streaming(arguments: Arguments, routing: Routing, l2_bytes: float) -> Traffic:
    """Every tensor once."""
    arguments.require_known()
    return Traffic(0.0, _memory(arguments, routing, ()), 0.0)


def grad_weights(arguments: Arguments, routing: Routing, l2_bytes: float) -> Traffic:
    unread = () if arguments["HAS_BIAS"] else ("grad_out",)
    return Traffic(0.0, _memory(arguments, routing, (), unread), 0.0)


FAMILIES: dict[str, Callable[[Arguments, Routing, float], Traffic]] = {
    "up_kernel": Product("hidden_TH", "weight", "width", ("act_NI", "pre_NP")),
    "grouped_linear_kernel": Product("rows_in", "weight", "B", ("out_NB",)),
    "backward_activation_kernel": Product("grad_out", "down_weight", "width", ("pre", "grad_pre", "weighted_act")),
    "weight_gradient_kernel": weight_gradient,
    "decode_up_kernel": decode_up,
    "decode_down_kernel": decode_down,
    "grad_weights_kernel": grad_weights,
    # routing
    "count_kernel": streaming,
    "place_kernel": streaming,
    "tile_maps_kernel": streaming,
    # sums and steps between two products
    "sum_k_kernel": streaming,
    "bias_gradient_kernel": streaming,
    "gather_rows_kernel": streaming,
    "row_of_slot_kernel": streaming,
    "combine_rows_kernel": streaming,
    "activation_kernel": streaming,
    "activation_backward_kernel": streaming,
}


def traffic(call: Call, routing: Routing, l2_bytes: float) -> Traffic:
    """Work of one launch on a device whose L2 holds `l2_bytes`."""
    return FAMILIES[call.launch.kernel](Arguments(call), routing, l2_bytes)
