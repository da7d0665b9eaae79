"""PEFT's LoRA on fused experts, run through the low-rank factors; config, files and Trainer stay PEFT's.

Stock PEFT builds `W + BA` for all experts, twice in every forward, and a dense gradient of it. `accelerate_adapters`
puts a subclass in the place of PEFT's wrapper: it hands the factors to the experts' own forward, which multiplies the
rows by them. Nothing is registered on the weights, so weights behind a parametrisation (4 bits) stay what they are.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from hf_moe.experts.backends import BACKENDS
from hf_moe.experts.contract import LowRank, LowRankPair, up_name
from hf_moe.models.moe_layers import MoeLayer, is_experts, moe_layers

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# PEFT compares the name of the class where it adds an adapter to a wrapped parameter
class ParamWrapper(peft_layer.ParamWrapper):
    """PEFT's wrapper of one expert projection (or of a linear layer's weight) whose forward keeps the factors apart.

    The wrappers of one experts module are nested; the outermost runs, and calls the experts with everybody's factors.
    """

    runs_low_rank = True

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        base: Any = self.get_base_layer()
        factors = {wrapper.parameter_name: low_rank for wrapper in nested(self) if (low_rank := _active(wrapper))}
        if not factors:
            return base(x, *args, **kwargs)
        if not is_experts(base):
            return _linear(base, x, factors["weight"])
        implementation = base.config._experts_implementation
        if (reason := _implementation_refuses(implementation)) is not None:
            raise ValueError(f"accelerated adapters cannot run: {reason}")
        pair = LowRankPair(factors.get(up_name(base)), factors.get("down_proj"))
        return base(x, *args, **kwargs, low_rank=pair)


def nested(wrapper: Any) -> Iterator[Any]:
    """`wrapper` and the wrappers of other parameters of the same module inside it."""
    while isinstance(wrapper, peft_layer.ParamWrapper):
        yield wrapper
        wrapper = wrapper.base_layer


def _active(wrapper: Any) -> LowRank | None:
    """The factors that count now, of several active adapters one after the other along the rank."""
    if wrapper.disable_adapters:
        if wrapper.merged:
            wrapper.unmerge()
        return None
    if wrapper.merged:
        return None
    found = [factors_of(wrapper, name) for name in wrapper.active_adapters if name in wrapper.lora_A]
    if len(found) < 2:
        return found[0] if found else None
    a = torch.cat([factors.a for factors in found], 1)
    return LowRank(a, torch.cat([factors.b * factors.scale for factors in found], 2), 1.0)


def factors_of(wrapper: Any, adapter: str) -> LowRank:
    """One adapter's factors, views of its parameters.

    PEFT holds A as `[E * R, in]` with the expert slowest, and B as `[out, R * E]` with the expert fastest.
    """
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    num_experts = wrapper.num_experts
    a = a.reshape(num_experts, -1, a.shape[1])
    b = b.reshape(len(b), -1, num_experts).permute(2, 0, 1)
    return LowRank(a, b, wrapper.scaling[adapter])


def _linear(base: nn.Module, x: Tensor, factors: LowRank) -> Tensor:
    """A linear layer whose weight is a targeted parameter: one expert, in PEFT's terms."""
    a, b, scale = factors.a[0], factors.b[0], factors.scale
    out = base(x)
    return out + ((x.to(a.dtype) @ a.T) @ b.T * scale).to(out.dtype)


def _implementation_refuses(implementation: str | None) -> str | None:
    backend = BACKENDS.get(implementation or "eager")
    if backend is not None and backend.takes_low_rank:
        return None
    takers = ", ".join(repr(name) for name, backend in BACKENDS.items() if backend.takes_low_rank)
    return (
        f"experts_implementation={implementation!r} takes no low-rank factors; {takers} do. Call "
        "model.set_experts_implementation('hf_moe')."
    )


def accelerate_adapters(model: nn.Module) -> list[str]:
    """Run the LoRA adapters on experts through their factors: no `W + BA`, no dense gradient of it.

    Call it after `get_peft_model`, `PeftModel.from_pretrained` or `model.load_adapter`; once more after an adapter was
    added to layers that had none. It swaps PEFT's wrappers in place, so everything that PEFT does with them goes on
    working, and files stay PEFT's. Adapters on weights of linear layers that were named in `target_parameters` run
    through their factors as well. Where one of the host's own experts implementations is set, `hf_moe` takes its
    place, for the base as well.

    Returns:
        The names of the MoE layers with accelerated adapters, also those of an earlier call.

    Raises:
        ValueError: If no expert has an adapter, or one cannot be run this way; nothing was changed then.
    """
    found = {layer.name: (layer, wrappers) for layer in moe_layers(model) if (wrappers := _wrappers(model, layer))}
    if not found:
        raise ValueError(
            "no expert of this model has a LoRA adapter: call accelerate_adapters after get_peft_model(model, "
            "expert_lora_config(model)), PeftModel.from_pretrained or load_adapter."
        )
    for name, (layer, wrappers) in found.items():
        if (reason := _refusal(layer, wrappers)) is not None:
            raise ValueError(f"the adapters of {name} cannot be accelerated: {reason}")
    _choose_implementation([layer for layer, _ in found.values()])
    stock = [module for module in model.modules() if type(module) is peft_layer.ParamWrapper and _is_served(module)]
    for wrapper in stock:
        wrapper.__class__ = ParamWrapper
    if stock:
        logger.info("adapters of %d MoE layers run through their low-rank factors, without W + BA.", len(found))
    return list(found)


def _wrappers(model: nn.Module, layer: MoeLayer) -> list[Any]:
    """PEFT's wrappers around the layer's experts, the outermost first."""
    parts = layer.experts_name.split(".")
    around = [model.get_submodule(".".join(parts[:end])) for end in range(1, len(parts))]
    outermost = next((module for module in around if isinstance(module, peft_layer.ParamWrapper)), None)
    return list(nested(outermost))


def _refusal(layer: MoeLayer, wrappers: list[Any]) -> str | None:
    """Why these wrappers cannot run through their factors, as a sentence that ends with a way out."""
    up = up_name(layer.experts)
    for wrapper in wrappers:
        if type(wrapper) not in (peft_layer.ParamWrapper, ParamWrapper):
            kind = f"{type(wrapper).__module__}.{type(wrapper).__qualname__}"
            return f"{wrapper.parameter_name} is wrapped by {kind}, not by PEFT: use one of the two alone."
        if wrapper.parameter_name not in (up, "down_proj"):
            return (
                f"{wrapper.parameter_name} is adapted; only the projections {up} and down_proj can be. Take it out of "
                "target_parameters."
            )
    if wrappers[-1].base_layer is not layer.experts:
        return f"{type(wrappers[-1].base_layer).__name__} stands between PEFT and the experts: adapt before wrapping."
    stored = layer.experts._parameters.get("down_proj")
    if stored is not None and stored.dtype not in _DTYPES:
        return f"the weights are stored as {stored.dtype}: load the model in bfloat16."
    implementation = layer.experts.config._experts_implementation
    backend = BACKENDS.get(implementation or "eager")
    if backend is None or (backend.forward is not None and not backend.takes_low_rank):
        return _implementation_refuses(implementation)
    return None


def _is_served(wrapper: Any) -> bool:
    base = wrapper.get_base_layer()
    return is_experts(base) or (isinstance(base, nn.Linear) and wrapper.parameter_name == "weight")


def _choose_implementation(layers: list[MoeLayer]) -> None:
    """Set `hf_moe` where the host's own experts implementation is set, which is what the host does unasked."""
    for layer in layers:
        config: Any = layer.experts.config
        if (backend := BACKENDS.get(config._experts_implementation or "eager")) and not backend.takes_low_rank:
            logger.info(
                "experts_implementation of %s: 'hf_moe' instead of %r, which takes no low-rank factors.",
                type(config).__name__,
                config._experts_implementation,
            )
            config._experts_implementation = "hf_moe"
