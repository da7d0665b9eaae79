"""The backend that commands choose where none is named."""

from typing import Any

from hf_moe.experts.backends import HF_MOE, choose
from hf_moe.experts.request import request_for
from hf_moe.layers.moe_layers import moe_layers
from hf_moe.layers.storage import storage_of


def prefer_hf_moe(model: Any) -> None:
    """Set `hf_moe` on a model of transformers, or leave its backend where `hf_moe` cannot run one of its layers.

    Adapters on experts run on `hf_moe`: so a base runs as it does with one.
    """
    layers = moe_layers(model)
    try:
        for layer in layers:
            choose(request_for(layer.experts, storage_of(layer.experts)))
    except ValueError:
        return
    if layers:
        model.set_experts_implementation(HF_MOE)
