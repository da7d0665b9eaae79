"""Launches of the launchers of hf_moe.kernels.triton, recorded without a GPU.

A launcher runs on tensors without storage (device "meta") and takes its tile from the table of the device that is
asked about; the call that would start a kernel records the types, constants and options instead. So what is compiled
is what runs, and a launcher that reads a value back from the device fails here.
"""

import ast
import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, native_specialize_impl

from hf_moe.kernels.triton import tiles

MAX_GRID = (2**31 - 1, 65535, 65535)


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher calls it: everything that the compiler needs to know, except the chip."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]  # argument -> type, or "constexpr"
    constants: tuple[tuple[str, Any], ...]  # argument -> value
    attributes: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]  # argument's position -> what is known of it
    options: tuple[tuple[str, Any], ...]

    def alike(self) -> "Launch":
        """This launch with any number of slots a token: a kernel divides by it, which changes no resources."""
        return dataclasses.replace(self, constants=tuple(pair for pair in self.constants if pair[0] != "TOP_K"))

    @property
    def starts_early(self) -> bool:
        """Whether the kernel may start while the one before it still runs."""
        return bool(dict(self.options).get("launch_pdl", False))

    def blocks(self) -> str:
        """The constants that shape a tile, to be read."""
        sizes = [str(value) for name, value in self.constants if name.startswith("BLOCK_") and name != "BLOCK_R"]
        named = {"num_warps": 4, "num_stages": 3} | dict(self.constants) | dict(self.options)  # Triton's defaults
        stages = named.get("STAGES", named["num_stages"])  # of one loop, or of all
        return f"{'x'.join(sizes) or '-'}, {named['num_warps']} warps, {stages} stages"


@dataclass(frozen=True)
class Call:
    """One launch with what it is launched on: its arguments by name, tensors without storage, and the programs."""

    launch: Launch
    values: dict[str, Any]
    programs: int


def arguments_of(function: JITFunction, grid: Any, args: tuple, kwargs: dict) -> tuple[dict[str, Any], int]:
    """The arguments of one call by name, and the number of programs.

    Raises:
        ValueError: If the grid is larger than a GPU takes.
    """
    values = dict(zip(function.arg_names, args, strict=False))
    values |= {name: value for name, value in kwargs.items() if name in function.arg_names}
    sizes = tuple(grid(values)) if callable(grid) else tuple(grid)
    if any(not 0 < size <= most for size, most in zip(sizes, MAX_GRID, strict=False)):
        raise ValueError(f"{function.__name__}: a grid must be in (0, {MAX_GRID}], got {sizes}.")
    return values, math.prod(sizes)


def specialize(function: JITFunction, target: GPUTarget, grid: Any, args: tuple, kwargs: dict) -> Launch:
    """Types, constants and alignment of one call, by Triton's own rules for the target.

    Raises:
        ValueError: If an argument is missing, or the grid is larger than a GPU takes.
    """
    backend = make_backend(target)
    values, _ = arguments_of(function, grid, args, kwargs)
    signature, constants, attributes = [], [], []
    for at, parameter in enumerate(function.params):
        if parameter.name not in values and not parameter.has_default:
            raise ValueError(f"{function.__name__} was launched without {parameter.name}.")
        value = values.get(parameter.name, parameter.default)
        kind, known = "constexpr", None
        if not parameter.is_constexpr:
            by_value, by_alignment = not parameter.do_not_specialize, not parameter.do_not_specialize_on_alignment
            kind, known = native_specialize_impl(backend, value, False, by_value, by_alignment)
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append((parameter.name, value))
        elif known:
            attributes.append((at, tuple(tuple(fact) for fact in backend.parse_attr(known))))
    options = tuple(sorted((name, value) for name, value in kwargs.items() if name not in function.arg_names))
    parts = (tuple(signature), tuple(constants), tuple(attributes), options)
    return Launch(function.fn.__module__, function.__name__, *parts)


@contextmanager
def recording(target: GPUTarget, device_name: str) -> Iterator[tuple[list[Call], list[tiles.Tile]]]:
    """Launches and the tiles that launchers asked for in this block, as if on a GPU of that name."""
    calls: list[Call] = []
    asked: list[tiles.Tile] = []
    nearest = tiles._nearest

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        calls.append(Call(specialize(self, target, grid, args, kwargs), *arguments_of(self, grid, args, kwargs)))

    def choose(*shape: Any) -> tiles.Tile:
        asked.append(nearest(*shape))
        return asked[-1]

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(tiles, "device_name", return_value=device_name),
        mock.patch.object(tiles, "_nearest", choose),
    ):
        yield calls, asked


def is_kernel(function: ast.FunctionDef) -> bool:
    """True if a function is decorated with triton.jit, with or without arguments."""
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def entry_kernels() -> set[tuple[str, str]]:
    """(module, name) of every @triton.jit function of hf_moe.kernels.triton that no other one calls."""
    functions, called = set(), set()
    for file in Path(tiles.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and is_kernel(node):
                functions.add((f"hf_moe.kernels.triton.{file.stem}", node.name))
                calls = (inner.func for inner in ast.walk(node) if isinstance(inner, ast.Call))
                called |= {function.id for function in calls if isinstance(function, ast.Name)}
    return {(module, name) for module, name in functions if name not in called}
