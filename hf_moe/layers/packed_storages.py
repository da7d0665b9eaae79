"""Storages of modules whose weights are no dense tensors: computed by a parametrisation, packed by a tensor class.

`torch.nn.utils.parametrize` computes a whole stack whenever it is read (so do PEFT and bitsandbytes,
`replace_parameter_4bit`, with it). Where a parametrisation computes every expert from that expert's own slices, one is
computed at a time, and only those that have rows; that this gives the same bits is tried on the whole stack, once for
each parameter, and again if anything that it is computed by was changed.

Shape suffixes: N routed rows in expert order, E experts, A and B the widths that a projection maps from and to.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_moe.kernels.layer_call import ExpertWeights
from hf_moe.layers.expert_rows import Plan, Projection, linear_by_expert, linear_by_matrix
from hf_moe.layers.geometry import geometry_of, parametrization_of, projection_name


def bytes_by_place(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Bytes of the tensors on each device; of those that tensor classes are made of."""
    places: dict[str, int] = {}
    for tensor in tensors:
        if is_subclass_with_own_values(tensor):
            names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else vars(tensor)
            parts = [part for name in names if isinstance(part := getattr(tensor, name), Tensor)]
        else:
            parts = [tensor]
        for part in parts:
            place = str(part.device)
            places[place] = places.get(place, 0) + part.numel() * part.element_size()
    return places


def is_subclass_with_own_values(weight: Any) -> bool:
    """Whether a tensor's class holds the values in a form of its own (torchao).

    Classes of torch itself do not: they trace or distribute, and a forward gets plain tensors out of them.
    """
    kind = type(weight)
    dispatches = getattr(kind, "__torch_dispatch__", Tensor.__torch_dispatch__) is not Tensor.__torch_dispatch__
    return dispatches and not kind.__module__.startswith("torch.")


class OwnWeights:
    """Base of storages that read an experts module."""

    def __init__(self, experts: Any):
        self.experts = experts

    @property
    def num_experts(self) -> int:
        return geometry_of(self.experts).num_experts

    def shape(self, projection: Projection) -> tuple[int, int]:
        _, hidden_size, expert_width = geometry_of(self.experts)
        pre_width = (2 if self.experts.has_gate else 1) * expert_width
        return (pre_width, hidden_size) if projection == "up" else (hidden_size, expert_width)

    def nbytes(self) -> dict[str, int]:
        return bytes_by_place([*self.experts.parameters(), *self.experts.buffers()])

    def tensors(self) -> None:
        return None

    def operands(self) -> ExpertWeights | None:
        return None

    def prefetch(self, plan: Plan) -> None:
        pass


class ParametrizedStorage(OwnWeights):
    """Weights behind `torch.nn.utils.parametrize`.

    Frozen experts that can be computed singly are: those with rows, in the forward and again in the backward. Where
    the parametrisation can only give the whole stack, it does so once for each projection in a forward, and once in a
    backward. One that is trained, or gives another stack each time, gives the whole one, which autograd keeps.
    """

    @property
    def format(self) -> str:
        entry = self._entry("down") or self._entry("up")
        return type(entry[0]).__name__

    @property
    def dtype(self) -> torch.dtype:
        entry = self._entry("down")
        if entry is None:
            return self.experts.down_proj.dtype
        declared = [getattr(getattr(each, "quant_state", None), "dtype", None) for each in entry]
        return next(filter(None, declared), None) or _dtype(entry, self.num_experts)

    @property
    def device(self) -> torch.device:
        entry = self._entry("down")
        return (self.experts.down_proj if entry is None else _stored(entry)).device

    # a loop over experts that have rows: which, is known when it runs
    @torch.compiler.disable
    def linear(self, rows_NA: Tensor, projection: Projection, plan: Plan) -> Tensor:
        name, transposed = projection_name(self.experts, projection), self.experts.is_transposed
        bias = getattr(self.experts, f"{name}_bias") if self.experts.has_bias else None
        entry, (width, _) = self._entry(projection), self.shape(projection)
        # found once: to know that it still holds, everything that computes the stack is looked at
        way = None if entry is None or _is_trained(entry) else _way(entry, self.num_experts)
        if way is None or not way.repeats:  # autograd keeps the stack: the backward could not compute it again
            # unbind's backward writes one gradient; an index for each expert would write one for each
            stack = getattr(self.experts, name).unbind()
            return linear_by_matrix(rows_NA, plan, stack, bias, width, transposed)
        one = way.one

        def matrices(experts: list[int]) -> Iterator[Tensor]:
            of: Callable[[int], Tensor] = entry().__getitem__ if one is None else one
            for expert in experts:
                yield of(expert).T if transposed else of(expert)

        return linear_by_expert(rows_NA, plan, matrices, width, bias)

    def _entry(self, projection: Projection) -> Any:
        return parametrization_of(self.experts, projection_name(self.experts, projection))


class _Way(NamedTuple):
    """Way to compute a parametrised stack.

    Attributes:
        key: What it was found for.
        dtype: Of the result.
        repeats: Whether it gives the same when it is asked twice (dropout does not).
        one: One expert's matrix; None if only the whole stack can be had.
    """

    key: tuple[Any, ...]
    dtype: torch.dtype
    repeats: bool
    one: Callable[[int], Tensor] | None


_ways: "weakref.WeakKeyDictionary[nn.Module, _Way]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def _way(entry: Any, num_experts: int) -> _Way:
    """Found once for each parameter; again if anything that computes it was exchanged, changed or set to train."""
    known = _ways.get(entry)
    if known is None or known.key != _state(entry, num_experts):
        known = _ways[entry] = _find_way(entry, num_experts)
    return known


def _is_trained(entry: Any) -> bool:
    """Whether a gradient is wanted of anything that computes the stack."""
    # what PEFT adds for a forward holds its factors as plain attributes
    attributes = (value for each in entry for value in vars(each).values() if isinstance(value, Tensor))
    return torch.is_grad_enabled() and any(each.requires_grad for each in (*entry.parameters(), *attributes))


def _find_way(entry: Any, num_experts: int) -> _Way:
    stored, weak = _stored(entry), weakref.ref(entry)
    with torch.autocast(stored.device.type, enabled=False), torch.random.fork_rng([stored.device] * stored.is_cuda):
        before, stack = _state(entry, num_experts), entry()
        key = _state(entry, num_experts)
        is_unchanged = key == before  # by being asked, as spectral norms are
        is_sliced = is_unchanged and _is_sliced(entry, stack, num_experts)
        repeats = is_sliced or stack.is_meta or (is_unchanged and torch.equal(entry(), stack))
    # the table must not keep what it is a table of
    one = (lambda expert: _one(weak(), expert, num_experts)) if is_sliced else None
    return _Way(key, stack.dtype, repeats, one)


def _state(entry: Any, num_experts: int) -> tuple[Any, ...]:
    """What a stack is computed by, to be compared with what it was."""
    tensors = [
        (id(each), each.shape, each.dtype, each.device, None if each.is_inference() else each._version)
        for each in _tensors(entry)
    ]
    return num_experts, [(each, each.training) for each in entry], tensors


def _tensors(entry: Any) -> Iterator[Tensor]:
    yield from entry.parameters()
    yield from entry.buffers()


_dtypes: "weakref.WeakKeyDictionary[nn.Module, tuple[list[Any], torch.dtype]]" = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result
def _dtype(entry: Any, num_experts: int) -> torch.dtype:
    """Dtype of the stack; other values do not change it, so one that is trained is computed for it once."""
    kinds = [*entry, *(each.dtype for each in _tensors(entry))]
    known = _dtypes.get(entry)
    if known is None or known[0] != kinds:
        known = _dtypes[entry] = (kinds, _way(entry, num_experts).dtype)
    return known[1]


def _is_sliced(entry: Any, stack: Tensor, num_experts: int) -> bool:
    """Whether every expert alone comes out as in the stack, in every bit."""
    if stack.is_meta or stack.shape[0] != num_experts or not entry.is_tensor:
        return False
    for expert in range(num_experts):
        try:
            alone = _one(entry, expert, num_experts)
        except (RuntimeError, ValueError, TypeError):  # what it computes does not fit together for one expert
            return False
        if alone.dtype != stack.dtype or not torch.equal(alone, stack[expert]):
            return False
    return True


def _stored(entry: Any) -> Tensor:
    """Tensor that a stack is computed from, or the first of several."""
    return entry.original if entry.is_tensor else entry.original0


@torch.no_grad()
def _one(entry: Any, expert: int, num_experts: int) -> Tensor:
    """The matrix of one expert, through slices of everything that has one for each expert."""
    stored = entry.original
    if stored.shape[0] == num_experts:
        value = stored[expert : expert + 1]
    else:  # packed into one row of values
        value = stored.reshape(num_experts, -1)[expert].reshape(-1, *stored.shape[1:])
    for parametrization in entry:
        value = _slice(parametrization, expert, num_experts)(value)
    return value[0]


def _slice(parametrization: Any, expert: int, num_experts: int) -> Callable[[Tensor], Tensor]:
    """A parametrisation as it is for one expert."""
    state: Any = getattr(parametrization, "quant_state", None)
    if getattr(state, "absmax", None) is not None:
        sliced = copy.copy(parametrization)
        sliced.quant_state = _slice_blocks(state, expert, state.shape.numel() // num_experts)
        sliced.quant_state.shape = torch.Size((1, *state.shape[1:]))
        return sliced
    own = {
        name: tensor[expert : expert + 1]
        for name, tensor in [*parametrization.named_parameters(), *parametrization.named_buffers()]
        if tensor.dim() and tensor.shape[0] == num_experts
    }
    return (lambda value: functional_call(parametrization, own, (value,))) if own else parametrization


def _slice_blocks(state: Any, part: int, size: int) -> Any:
    """bitsandbytes' state of the `part`-th `size` values; its scales may be quantised in blocks as well."""
    if size % state.blocksize:
        raise ValueError(f"an expert's {size} values are not whole blocks of {state.blocksize}.")
    blocks = size // state.blocksize
    sliced = copy.copy(state)
    sliced.absmax = state.absmax[part * blocks : (part + 1) * blocks]
    if getattr(state, "nested", False):
        sliced.state2 = _slice_blocks(state.state2, part, blocks)
    return sliced


class Stacks(NamedTuple):
    """Weights that are tensors of all experts.

    Attributes:
        weights: As they are now.
        transposed: Whether the matrices are stored `[E, in, out]`.
    """

    weights: ExpertWeights
    transposed: bool

    @property
    def num_experts(self) -> int:
        return self.weights.down.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.weights.down.dtype

    @property
    def device(self) -> torch.device:
        return self.weights.down.device

    def shape(self, projection: Projection) -> tuple[int, int]:
        _, out, inner = (self.weights.up if projection == "up" else self.weights.down).shape
        return (inner, out) if self.transposed else (out, inner)

    def nbytes(self) -> dict[str, int]:
        return bytes_by_place(tensor for tensor in self.weights if tensor is not None)

    def linear(self, rows_NA: Tensor, projection: Projection, plan: Plan) -> Tensor:
        """In plain torch, one expert after the other."""
        up, up_bias, down, down_bias, *_ = self.weights
        weight, bias = (up, up_bias) if projection == "up" else (down, down_bias)
        width, _ = self.shape(projection)
        return linear_by_matrix(rows_NA, plan, weight, bias, width, self.transposed)

    def prefetch(self, plan: Plan) -> None:
        pass


class SubclassStorage(Stacks):
    """Weights of a tensor class that packs its values; the class itself multiplies by one expert's."""

    __slots__ = ()

    @property
    def format(self) -> str:
        weight = self.weights.down if is_subclass_with_own_values(self.weights.down) else self.weights.up
        return type(weight).__name__

    @torch.compiler.disable
    def linear(self, rows_NA: Tensor, projection: Projection, plan: Plan) -> Tensor:
        return super().linear(rows_NA, projection, plan)

    def tensors(self) -> None:
        return None

    def operands(self) -> None:
        return None


class UnreadableStorage(OwnWeights):
    """Weights in a form that only their own module reads (int8 and its scales, a placeholder of a parallel wrapper).

    Args:
        weight: One of them.
        reason: Why they are not read, with the way out; without it their form is.
    """

    def __init__(self, experts: Any, weight: Any, reason: str = ""):
        super().__init__(experts)
        self.weight, self._reason = weight, reason

    @property
    def reason(self) -> str:
        """As a sentence that ends with a way out."""
        stored = f"the weights are stored as {self.format}, which hf_moe does not read: load the model in bfloat16."
        return self._reason or stored

    @property
    def format(self) -> str:
        if not isinstance(self.weight, Tensor):
            return "no tensor"
        return f"{self.weight.dtype}" if self.weight.dim() == 3 else f"{self.weight.dim()}-D {self.weight.dtype}"

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype if isinstance(self.weight, Tensor) else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        return self.weight.device if isinstance(self.weight, Tensor) else torch.device("cpu")

    def linear(self, rows_NA: Tensor, projection: Projection, plan: Plan) -> Tensor:
        raise TypeError(f"{type(self.experts).__name__} runs with experts_implementation='eager' alone: {self.reason}")
