"""Prove that a base is what it was before an adapter came, and put it back where it is not.

Nothing short of reading the values proves it: a write through `.data` leaves tensor, storage and version counter as
they were. Each pass reads every parameter and buffer once, on the device where it is.
"""

import copy
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

# words at a time: what is computed from them stays in the processor's cache
_WORDS = 2**18
_PRIME = 2**61 - 1
_PROBE_TOKENS = 4


class BaseState:
    """Modules, settings and tensors of a model, kept by reference beside a digest of every tensor.

    Copies no weight (one tensor at a time where it is not contiguous), and reads all of them, here and in each
    `difference`: about 1 GB/s on each CPU core. Tensors on the meta device have no values, only shapes.
    """

    def __init__(self, model: nn.Module):
        self._hash = KeyedHash()
        self._modules = dict(model.named_modules())
        self._tensors = {
            (path, name): tensor for path, module in self._modules.items() for name, tensor in own_tensors(module)
        }
        # the same storage under another tensor: what replaces `.data` replaces the first alone
        self._aliases = {key: (tensor.detach(), tensor.requires_grad) for key, tensor in self._tensors.items()}
        self._attributes = [_Attributes(each) for each in _with_configs(self._modules.values())]
        self._digests = self._all_digests()

    def difference(self, model: nn.Module) -> str | None:
        """The part of the base that is not in `model` (itself, or what it became), or has other values; or None."""
        present = {id(module) for module in model.modules()}
        for path, module in self._modules.items():
            if id(module) not in present:
                return f"the module {path or type(module).__name__} was replaced"
        now = self._all_digests()
        for (path, name), digest in self._digests.items():
            if now.get((path, name)) != digest:
                return f"{path}.{name} has other values".removeprefix(".")
        return None

    def restore(self) -> None:
        """Put back modules, attributes, tensors and their storage. Values that were written over are lost."""
        for attributes in self._attributes:
            attributes.restore()
        for key, tensor in self._tensors.items():
            alias, requires_grad = self._aliases[key]
            tensor.requires_grad_(requires_grad)
            if not _parts(tensor) and tensor.data_ptr() != alias.data_ptr():
                tensor.data = alias

    def _all_digests(self) -> dict[tuple[str, str], tuple]:
        known: dict[int, tuple] = {}
        digests = {}
        for path, module in self._modules.items():
            for name, tensor in own_tensors(module):
                if id(tensor) not in known:
                    known[id(tensor)] = self._hash.of(tensor)
                digests[path, name] = known[id(tensor)]
        return digests


class _Attributes:
    """An object's attributes, and what the dictionaries, lists and sets among them hold."""

    def __init__(self, owner: Any):
        self._owner = owner
        self._type = type(owner)
        self._values = dict(vars(owner))
        self._contents = {
            name: copy.copy(value) for name, value in self._values.items() if isinstance(value, dict | list | set)
        }

    def restore(self) -> None:
        if type(self._owner) is not self._type:
            self._owner.__class__ = self._type
        vars(self._owner).clear()
        vars(self._owner).update(self._values)
        for name, contents in self._contents.items():
            value = self._values[name]
            if isinstance(value, list):
                value[:] = contents
            else:
                value.clear()
                value.update(contents)


def _with_configs(modules: Any) -> Iterator[Any]:
    configs: dict[int, PreTrainedConfig] = {}
    for module in modules:
        yield module
        configs |= {id(value): value for value in vars(module).values() if isinstance(value, PreTrainedConfig)}
    yield from configs.values()


def _parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that one of another type (sharded, quantised) is made of; none of a plain one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    # a sharded one names its mesh, too
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [part for part in parts if isinstance(part, Tensor)]


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The module's parameters and buffers by name, not those of its children."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None:
            yield name, tensor


class KeyedHash:
    """A hash of a tensor's bytes whose key is drawn for each object, so that nobody can aim at a collision.

    A sum of 32-bit words times random 64-bit numbers (modulo 2**64) for each block of words, and a polynomial of the
    blocks' sums (modulo 2**61 - 1): two unequal tensors of one shape agree with a probability below 2**-31.

    Source: Carter and Wegman 1979, "Universal classes of hash functions"; Lemire and Kaser 2014 (arXiv:1202.4961).
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(secrets.randbits(63))
        self._key = torch.randint(-(2**63), 2**63 - 1, (_WORDS,), generator=generator)
        self._base = 1 + secrets.randbelow(_PRIME - 1)
        self._on_device = {self._key.device: self._key}

    def of(self, tensor: Tensor) -> tuple:
        """Type, shape and hash; of a tensor that is made of others (sharded, quantised), of each of them."""
        if parts := _parts(tensor):
            return (tuple(tensor.shape), *map(self.of, parts))
        described = (str(tensor.dtype), tuple(tensor.shape))
        return described if tensor.is_meta or not tensor.numel() else (*described, self._hash(tensor.detach()))

    @torch.no_grad()
    def _hash(self, tensor: Tensor) -> int:
        key = self._on_device.get(tensor.device)
        if key is None:
            key = self._on_device[tensor.device] = self._key.to(tensor.device)
        sums = [(block.long() * key[: len(block)]).sum() for block in _words(tensor).split(_WORDS)]
        total = 0
        for value in torch.stack(sums).tolist():
            total = (total * self._base + value) % _PRIME
        return total


def _words(tensor: Tensor) -> Tensor:
    """The bytes as int32, filled up with zeros."""
    octets = tensor.contiguous().flatten().view(torch.uint8)
    if len(octets) % 4 or octets.storage_offset() % 4:
        octets = nn.functional.pad(octets, (0, -len(octets) % 4))
    return octets.view(torch.int32)


class BaseOutputs:
    """Outputs of a base for a few token ids in evaluation mode, to compare bit by bit.

    Nothing is compared where there is nothing to run (no values, no token ids), or where two runs of the base itself
    differ: then only its tensors prove anything.

    Args:
        model: The base, or what it has become with other adapters, which are off while it runs.
        base: The base itself.
    """

    def __init__(self, model: nn.Module, base: PreTrainedModel):
        self._inputs = _probe_inputs(base)
        self._outputs: Tensor | None = None
        if self._inputs is not None:
            # the first run may still choose kernels
            runs = [self._without_adapters(model) for _ in range(2)]
            self._outputs = runs[1] if _same_bits(*runs) else None
            self.is_finite = bool(runs[1].isfinite().all())

    def are_those_of(self, model: nn.Module) -> bool:
        """True if `model` gives them to the last bit with its adapters off."""
        return self._outputs is None or _same_bits(self._outputs, self._without_adapters(model))

    def are_finite_on(self, model: nn.Module) -> bool:
        """True if `model` as it is gives finite outputs, if the base did."""
        return self._inputs is None or not self.is_finite or bool(self._run(model).isfinite().all())

    def _without_adapters(self, model: Any) -> Tensor:
        if isinstance(model, PreTrainedModel):
            return self._run(model)
        with _flags_kept(model), model.disable_adapter():
            return self._run(model)

    @torch.no_grad()
    def _run(self, model: nn.Module) -> Tensor:
        with _flags_kept(model):
            # PEFT freezes a base, and for frozen weights torch may have other kernels (conv1d), also without gradients
            return model.eval().requires_grad_(False)(**(self._inputs or {}))[0].clone()


def _probe_inputs(base: PreTrainedModel) -> dict[str, Tensor] | None:
    if base.device.type == "meta" or base.main_input_name != "input_ids":
        return None
    weight: Any = base.get_input_embeddings().weight
    ids = torch.arange(_PROBE_TOKENS, device=weight.device)[None] % weight.shape[0]
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if base.config.is_encoder_decoder else {})


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(_words(first), _words(second))


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """PEFT makes an adapter trainable where it turns it on again."""
    training = [(module, module.training) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, is_training in training:
            module.training = is_training
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
