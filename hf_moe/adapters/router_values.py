"""SHA-256 over the values of routers, whatever they are stored as.

The first form of the hash (records without a version) took dtype and bytes as they lay in memory. One bfloat16
checkpoint then had two: transformers 5.24 keeps the router of 19 families in float32, transformers 5.23 did not.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

VERSION = 2
"""Of what `values_hash` hashes; written into each record."""

_MOST_CANDIDATES = 64
_FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}

Router = Mapping[str, Tensor]


def values_hash(routers: Iterable[Router]) -> str:
    """Over position, name, shape and values: floats as float32, integers and truth values as int64.

    float64 that float32 cannot hold exactly is hashed as float64.
    """
    sha = hashlib.sha256()
    for position, tensors in enumerate(routers):
        for name in sorted(tensors):
            _add(sha, position, name, _canonical(tensors[name]))
    return sha.hexdigest()


def first_hashes(routers: Sequence[Router], dtypes: str) -> Iterator[str]:
    """Hashes that the first form may have given: as the routers are stored, then as each mix of the recorded `dtypes`.

    A tensor is only cast where that changes no value. A name has one dtype in all layers, as in every family.
    """
    yield _first_hash(routers, {})
    names = sorted({name for router in routers for name in router})
    recorded = [_FLOATS[name] for name in dtypes.split(", ") if name in _FLOATS]
    choices = [_possible([router[name] for router in routers if name in router], recorded) for name in names]
    count = 1
    for choice in choices:
        count *= len(choice)
    if count <= _MOST_CANDIDATES:
        for chosen in product(*choices):
            yield _first_hash(routers, dict(zip(names, chosen, strict=True)))


def _canonical(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.to(torch.int64)
    single = tensor.to(torch.float32)
    return tensor if tensor.dtype == torch.float64 and not _same_values(single, tensor) else single


def _possible(tensors: Sequence[Tensor], recorded: Sequence[torch.dtype]) -> list[torch.dtype | None]:
    """Of the recorded dtypes, those that hold these values exactly; None: as they are stored."""
    if not all(tensor.is_floating_point() for tensor in tensors):
        return [None]
    found = [dtype for dtype in recorded if all(_same_values(tensor.to(dtype), tensor) for tensor in tensors)]
    return [*found] or [None]


def _same_values(cast: Tensor, tensor: Tensor) -> bool:
    return bool(((cast.to(tensor.dtype) == tensor) | tensor.isnan()).all())


def _first_hash(routers: Sequence[Router], dtypes: Mapping[str, torch.dtype | None]) -> str:
    sha = hashlib.sha256()
    for position, tensors in enumerate(routers):
        for name in sorted(tensors):
            dtype = dtypes.get(name)
            _add(sha, position, name, tensors[name] if dtype is None else tensors[name].to(dtype))
    return sha.hexdigest()


def _add(sha: "hashlib._Hash", position: int, name: str, tensor: Tensor) -> None:
    sha.update(f"{position} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    sha.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
