"""Refuse, before the first forward, balancing terms that cannot work on a model."""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.utils import is_peft_available

from hf_moe.adapters.frozen_router import active_auxiliary_losses
from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.unseen_experts import required_layers
from hf_moe.training.autograd_graph import graph_leaves
from hf_moe.training.balancing.bias_update import CORRECTION_BIASES, correction_bias
from hf_moe.training.balancing.config import BalancingConfig

logger = logging.getLogger(__name__)


class BalancingError(ValueError):
    """A balancing term that was asked for cannot work on this model; says which, why, and the way out."""


def balanced_layers(model: nn.Module, config: BalancingConfig) -> list[MoeLayer]:
    """The layers that the terms of `config` apply to, after all checks.

    Layers whose router looks the experts up by token id (the first ones of DeepSeek-V4) are left out and logged: no
    term can change their load.

    Raises:
        BalancingError: Naming the term and the first layer that it cannot work on.
    """
    try:
        layers = required_layers(model, dense="Pass a Mixture-of-Experts model, or balancing=None.")
    except ValueError as error:
        raise BalancingError(str(error)) from error
    looked_up = [layer for layer in layers if _is_looked_up(layer)]
    if looked_up:
        names = ", ".join(layer.name for layer in looked_up)
        logger.warning("not balanced: the experts of a token are looked up by its id in %s.", names)
    layers = [layer for layer in layers if not _is_looked_up(layer)]
    for layer in layers:
        _refuse_layer(model, layer, config)
    _refuse_own_losses(model, config)
    return layers


def _is_looked_up(layer: MoeLayer) -> bool:
    return layer.router is not None and any(name.endswith("tid2eid") for name, _ in layer.router.named_buffers())


def _refuse_layer(model: nn.Module, layer: MoeLayer, config: BalancingConfig) -> None:
    terms = " and ".join(
        name for name in ("aux_loss_coef", "z_loss_coef", "bias_update_rate") if getattr(config, name) > 0
    )
    if layer.router is None:
        raise BalancingError(f"{terms}: the block {layer.name!r} has no router module to balance.")
    parameters = list(layer.router.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        raise BalancingError(
            f"{terms}: the router of {layer.name!r} is frozen, and balancing would change it or push the rest of the "
            "model around. Take balancing out, or let the routers train."
        )
    if (config.aux_loss_coef > 0 or config.bias_update_rate > 0) and layer.top_k >= layer.num_experts:
        raise BalancingError(
            f"{terms}: layer {layer.name!r} has {layer.num_experts} experts and a token may take {layer.top_k}, or "
            "they choose the tokens: the load does not depend on the router. z_loss_coef alone works."
        )
    if config.bias_update_rate > 0:
        _refuse_bias(model, layer)


def _refuse_bias(model: nn.Module, layer: MoeLayer) -> None:
    found = correction_bias(model, layer)
    if found is None:
        raise BalancingError(
            f"bias_update_rate: layer {layer.name!r} keeps no correction bias ({', '.join(CORRECTION_BIASES)}). "
            "hf_moe models have one with router_bias=True; for others use aux_loss_coef."
        )
    name, bias = found
    if bias.dtype not in (torch.float32, torch.float64):
        raise BalancingError(
            f"bias_update_rate: {name} is {bias.dtype}, in which small updates round to nothing. Keep it in float32."
        )
    if bias.requires_grad:
        raise BalancingError(
            f"bias_update_rate: {name} requires a gradient, so an optimizer may move it as well. Call "
            "requires_grad_(False) on it."
        )
    if bias.numel() < layer.num_experts:
        raise BalancingError(
            f"bias_update_rate: {name} has {bias.numel()} values for {layer.num_experts} experts: it is sharded. "
            "Balance with aux_loss_coef."
        )
    if _is_peft(model) and ".modules_to_save." not in name:
        raise BalancingError(
            f"bias_update_rate: an adapter would be saved without {name}. Name the router in modules_to_save, or "
            "balance with aux_loss_coef."
        )


def _is_peft(model: nn.Module) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return any(isinstance(module, PeftModel) for module in model.modules())


def _refuse_own_losses(model: nn.Module, config: BalancingConfig) -> None:
    own = active_auxiliary_losses(model)
    twice = []
    if config.aux_loss_coef > 0:
        twice += [name for name in own if "z_loss" not in name]
    if config.z_loss_coef > 0:
        twice += [name for name in own if "z_loss" in name]
    if twice:
        zeros = ", ".join(f"model.config.{name} = 0" for name in twice)
        raise BalancingError(
            f"the model's own forward adds this loss already ({', '.join(f'{name}={own[name]}' for name in twice)}), "
            f"so balancing would count it twice. Set {zeros} (a native model: or output_router_logits = False; TRL's "
            "trainers: router_aux_loss_coef=0.0 in their config), or leave the term out of BalancingConfig."
        )


def reaches(output: Tensor, leaves: Sequence[Tensor]) -> bool:
    """True if the gradient of `output` flows into one of `leaves`, by the graph that computed it."""
    wanted = {id(leaf) for leaf in leaves}
    return id(output) in wanted or any(id(leaf) in wanted for leaf in graph_leaves(output))
