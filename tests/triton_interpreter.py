"""Run Triton kernels on a CPU: the interpreter's switch, and repairs for what it computes wrongly.

`switch_on_without_gpu()` comes before the first `import triton` (transformers' models import it), so tests/conftest.py
calls it. `repair()` comes before the first launch. A machine with a GPU is left alone: kernels run compiled there.

What Triton 3.6 to 3.9 get wrong, and the repair:
1. `tl.dot` on bfloat16 multiplies the raw bits (results of about 1e21);
2. so do arithmetic and comparisons of bfloat16 values, which GPUs allow;
3. casts to bfloat16 truncate, and copy raw integers: GPUs and torch round to nearest even;
4. 3.6 with numpy 2.4 or newer cannot take a run-time scalar in `range()`.
"""

import os

import numpy as np
import torch

SWITCH = "TRITON_INTERPRET"
REPAIRED = ("create_dot", "binary_op", "cast_impl")  # methods of triton's InterpreterBuilder


def switch_on_without_gpu() -> None:
    if not torch.cuda.is_available():
        os.environ.setdefault(SWITCH, "1")


def is_on() -> bool:
    return os.environ.get(SWITCH, "0").lower() in ("1", "true", "yes", "on")


def device() -> torch.device:
    """Where kernels run: the CPU when interpreted, the GPU when compiled."""
    return torch.device("cpu" if is_on() else "cuda")


def repair() -> dict:
    """Replace the interpreter's wrong methods, once; returns the methods as they were, by name."""
    from triton.runtime.interpreter import InterpreterBuilder

    if not hasattr(InterpreterBuilder, "methods_before_repair"):
        InterpreterBuilder.methods_before_repair = {name: getattr(InterpreterBuilder, name) for name in REPAIRED}
        _repair_bfloat16(InterpreterBuilder)
        _repair_range()
    return InterpreterBuilder.methods_before_repair


def _repair_bfloat16(builder) -> None:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    before = {name: getattr(builder, name) for name in REPAIRED}

    def is_bfloat16(handle) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def values(handle) -> np.ndarray:
        return _widen(handle.data) if is_bfloat16(handle) else handle.data

    def create_dot(self, a, b, d, *args):
        if is_bfloat16(a) or is_bfloat16(b):
            return TensorHandle(np.matmul(values(a), values(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)
        return before["create_dot"](self, a, b, d, *args)

    def binary_op(self, lhs, rhs, op):
        if is_bfloat16(lhs) or is_bfloat16(rhs):
            out = op(values(lhs), values(rhs))
            return TensorHandle(out if out.dtype == bool else _round(out), lhs.dtype.scalar)
        return before["binary_op"](self, lhs, rhs, op)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and not is_bfloat16(src):
            return TensorHandle(_round(src.data), dst_type.scalar)
        return before["cast_impl"](self, src, dst_type)

    builder.create_dot, builder.binary_op, builder.cast_impl = create_dot, binary_op, cast_impl


def _widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, which the interpreter keeps as uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round(array: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even, NaN kept."""
    wide = np.asarray(array).astype(np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def _repair_range() -> None:
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    patch_tensor = interpreter._patch_lang_tensor

    def patch_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_with_index
