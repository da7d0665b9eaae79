"""Balancing without a loss: after each optimizer step the bias of the choice goes up for experts with little load.

The bias shifts which experts are chosen, never their weights. Source: Wang et al. 2024 (arXiv:2408.15664).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_moe.layers.moe_layers import MoeLayer

# what the families of transformers 5.23 call it, on the router, in a module of it, or on the block
CORRECTION_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def correction_bias(model: nn.Module, layer: MoeLayer) -> tuple[str, Tensor] | None:
    """Path in the model and tensor, one value for each expert that the router scores, of a layer's correction bias.

    Under PEFT's `modules_to_save` it is that of the copy in use. None if the layer keeps no such bias.
    """
    block = model.get_submodule(layer.name)
    prefix = f"{layer.name}." if layer.name else ""
    found = {
        prefix + name: tensor
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]
        if name.rpartition(".")[2] in CORRECTION_BIASES
    }
    return next(((name, tensor) for name, tensor in found.items() if _is_in_use(model, name)), None)


def _is_in_use(model: nn.Module, path: str) -> bool:
    """False for the original that a trained copy replaces, and for copies of adapters that are not active."""
    for mark in ("original_module", "modules_to_save"):
        head, found, tail = path.partition(f".{mark}.")
        if found:
            wrapper: Any = model.get_submodule(head)
            return mark == "modules_to_save" and tail.partition(".")[0] in wrapper.active_adapters
    return True


@torch.no_grad()
def update_bias(bias: Tensor, counts: Tensor, rate: float, num_experts: int) -> None:
    """`bias += rate * sign(mean - counts)` in place, over the real experts.

    Biases of null experts, the entries from `num_experts` on, stay: how often a token computes less is for the model
    to learn. Without any assignment nothing changes.

    Args:
        bias: `[X]` or `[1, X]`.
        counts: `[X]`, assignments of one optimizer step over all processes.
    """
    real = counts[:num_experts].double() if counts.device.type != "mps" else counts[:num_experts].float()
    bias.view(-1)[:num_experts].add_(torch.sign(real.mean() - real).to(bias), alpha=rate)


class BiasUpdater:
    """Sums the assignments of an optimizer step by layer, and updates the biases from the sums over all processes.

    Args:
        layers: Each with a correction bias.
    """

    def __init__(self, model: nn.Module, layers: Sequence[MoeLayer], rate: float):
        self._rate = rate
        self._layers = {layer.name: layer for layer in layers}
        self._biases = {layer.name: _bias_of(model, layer) for layer in layers}
        self._counts: dict[str, Tensor] = {}

    def updates(self, layer: MoeLayer) -> bool:
        return layer.name in self._layers

    def num_choices(self, layer: MoeLayer) -> int:
        """Experts that the router of `layer` scores."""
        return self._biases[layer.name].numel()

    def add(self, layer: MoeLayer, counts: Tensor) -> None:
        """Add the assignments `[X]`, int64, of one forward."""
        held = self._counts.get(layer.name)
        self._counts[layer.name] = counts if held is None else held + counts

    def step(self) -> None:
        """Update every bias and start counting again."""
        counts = self._global_counts()
        for name, layer in self._layers.items():
            update_bias(self._biases[name], counts[name].to(self._biases[name].device), self._rate, layer.num_experts)
        self.clear()

    def clear(self) -> None:
        self._counts = {}

    def largest(self) -> float:
        """The largest difference between two experts' biases in one layer: how much the choice is shifted."""
        biases = [self._biases[name].view(-1)[: layer.num_experts] for name, layer in self._layers.items()]
        return max(float(bias.max() - bias.min()) for bias in biases)

    def _global_counts(self) -> dict[str, Tensor]:
        """One message for all layers; of every layer, as one that another process did not run counts there."""
        device = next(iter(self._biases.values())).device
        sizes = {name: bias.numel() for name, bias in self._biases.items()}
        counts = [
            self._counts[name].to(device) if name in self._counts else torch.zeros(size, dtype=torch.int64).to(device)
            for name, size in sizes.items()
        ]
        packed = torch.cat(counts)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(packed)
        return dict(zip(sizes, packed.split(list(sizes.values())), strict=True))


def _bias_of(model: nn.Module, layer: MoeLayer) -> Tensor:
    found = correction_bias(model, layer)
    if found is None:
        raise ValueError(f"layer {layer.name!r} keeps no correction bias ({', '.join(CORRECTION_BIASES)}).")
    return found[1]
