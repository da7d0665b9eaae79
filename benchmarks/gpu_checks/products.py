"""Each kernel of the tile tables as one launch of a real layer, with any tile; and what is launched between them.

Shape suffixes: T tokens, K slots per token, N = T*K routed rows, E experts, P pre-activation width, H hidden, I expert
width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

from hf_moe.kernels.triton import backward_activation, grouped_linear, tiles, up, weight_gradient
from hf_moe.kernels.triton.combine import launch_sum_k
from hf_moe.kernels.triton.routing import sort_rows
from hf_moe.kernels.triton.tiles import Tile

from .problems import SWIGLU, random_layer
from .setting import Setting, Sizes

LAUNCHERS = {
    "up": up,
    "grouped_linear": grouped_linear,
    "backward_activation": backward_activation,
    "weight_gradient": weight_gradient,
}
# other numbers than the shipped one of row tiles that share a weight tile in L2
GROUPS = (4, 16)


class Product(NamedTuple):
    """One launch.

    Attributes:
        kernel: Of the tile tables; None where there is no tile to choose.
        shape: Rows per expert, columns and reduced dimension, as `tile_for` is asked.
        launch: Gives the main result.
    """

    kernel: str | None
    shape: tuple[int, int, int]
    launch: Callable[[], Tensor]


def products_of(sizes: Sizes, tokens: int, dtype: torch.dtype, device: str) -> dict[str, Product]:
    """The launches of one SwiGLU layer, forward and backward, on tensors of their own."""
    layer = random_layer(sizes, tokens, dtype, device)
    experts, slots = sizes.experts, sizes.slots
    num_rows, pre_width = tokens * slots, 2 * sizes.width
    order = sort_rows(layer.index, experts, experts)
    generator = torch.Generator(device).manual_seed(9)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    act_NI, pre_NP = normal(num_rows, sizes.width), normal(num_rows, pre_width)
    rows_NH, grad_out_TH = normal(num_rows, sizes.hidden), normal(tokens, sizes.hidden)
    row_weights_N = layer.weights.reshape(-1)

    def forward_up(store_pre: bool) -> Tensor:
        return up.launch_up(layer.hidden, layer.up_weight, order, SWIGLU, top_k=slots, store_pre=store_pre)[0]

    def linear(rows: Tensor, weight: Tensor, transposed: bool, weights_N: Tensor | None = None) -> Tensor:
        return grouped_linear.launch_grouped_linear(
            rows, weight, order, top_k=slots, transposed=transposed, scatter=True, row_weights_N=weights_N
        )

    def through_activation() -> Tensor:
        return backward_activation.launch_backward_activation(
            grad_out_TH, layer.down_weight, pre_NP, order, layer.weights, SWIGLU
        )[0]

    def gradient(left: Tensor, right: Tensor, **gathered: bool) -> Tensor:
        return weight_gradient.launch_weight_gradient(left, right, order, top_k=slots, out_dtype=dtype, **gathered)

    rows, hidden, width = num_rows // experts, sizes.hidden, sizes.width
    into, out_of = (rows, width, hidden), (rows, hidden, width)
    return {
        "routing": Product(None, into, lambda: sort_rows(layer.index, experts, experts).order_N),
        "up": Product("up", into, lambda: forward_up(False)),
        "up, pre stored": Product("up", into, lambda: forward_up(True)),
        "down": Product(
            "grouped_linear", out_of, lambda: linear(act_NI, layer.down_weight, False, row_weights_N)
        ),
        "sum over slots": Product(None, out_of, lambda: launch_sum_k(rows_NH, slots, dtype)),
        "backward_activation": Product("backward_activation", into, through_activation),
        "dX": Product(
            "grouped_linear", (rows, hidden, pre_width), lambda: linear(pre_NP, layer.up_weight, True)
        ),
        "dW up": Product(
            "weight_gradient", (rows, hidden, pre_width), lambda: gradient(pre_NP, layer.hidden, gather_right=True)
        ),
        "dW down": Product(
            "weight_gradient", (rows, width, hidden), lambda: gradient(grad_out_TH, act_NI, gather_left=True)
        ),
    }  # fmt: skip


def tiles_of(setting: Setting, kernel: str) -> list[Tile]:
    """Tiles to try: those of the setting, and every one that the tables of this device ship."""
    shipped = [] if setting.device == "cpu" else tiles.candidates(kernel, torch.bfloat16, this_device())
    return list(dict.fromkeys([*setting.tiles[kernel], *shipped]))


def this_device() -> str:
    return tiles.device_name(torch.device("cuda", torch.cuda.current_device()))


def shipped_tile(kernel: str, shape: tuple[int, int, int], device: str) -> Tile:
    return tiles.tile_for(kernel, *shape, torch.bfloat16, torch.device(device))


def title(tile: Tile) -> str:
    return f"{tile.block_m}x{tile.block_n}x{tile.block_k}, {tile.num_warps} warps, {tile.num_stages} stages"


@contextmanager
def with_groups(kernel: str, row_tiles: int) -> Iterator[None]:
    """Launchers of `kernel` let so many row tiles sweep the columns together."""
    with mock.patch.object(LAUNCHERS[kernel], "ROW_TILES_PER_GROUP", row_tiles):
        yield


@contextmanager
def with_tile(kernel: str, tile: Tile) -> Iterator[None]:
    """Launchers of `kernel` take this tile."""
    with mock.patch.object(LAUNCHERS[kernel], "tile_for", return_value=tile):
        yield
