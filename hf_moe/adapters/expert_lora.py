"""PEFT's LoRA on fused experts, run through the low-rank factors; config, files and Trainer stay PEFT's.

Stock PEFT builds `W + BA` for all experts, twice in every forward, and a dense gradient of it. `accelerate_adapters`
puts a subclass in the place of PEFT's wrapper: it hands the factors to the experts' own forward, which multiplies the
rows by them, and by whatever stores the weights (`layers.storage`): 4 bits stay 4 bits.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from hf_moe.adapters import lora_options, lora_targets
from hf_moe.experts.backends import BACKENDS, OURS
from hf_moe.kernels.layer_call import LowRank, LowRankPair
from hf_moe.layers.geometry import up_name
from hf_moe.layers.moe_layers import MoeLayer, is_experts, moe_layers
from hf_moe.layers.packed_storages import UnreadableStorage
from hf_moe.layers.storage import storage_of
from hf_moe.layers.unseen_experts import required_layers

logger = logging.getLogger(__name__)


def expert_lora_config(
    model: nn.Module,
    r: int = 16,
    *,
    lora_alpha: float | None = None,
    attention: bool = False,
    shared_experts: bool = False,
    **kwargs: Any,
) -> LoraConfig:
    """A LoRA config for both projections of every expert that `moe_layers(model)` finds, and for no router.

    Args:
        model: Native or hf_moe, also with adapters on it.
        r: Rank of every expert's factors. An adapter holds `E * r * (in + out)` values for each projection.
        lora_alpha: The product is scaled by `lora_alpha / r`; without it by 2.
        attention: Also the projections of the attention in the layers' stack.
        shared_experts: Also the linear layers of shared experts.
        **kwargs: Of `LoraConfig`, those that `lora_options.HONOURED` lists; `target_modules`, a list of names, adds to
            what the options choose. `layers_to_transform`, `layers_pattern` and `exclude_modules` choose experts by
            the paths of their module and parameters as PEFT chooses modules; `rank_pattern` and `alpha_pattern` are
            matched with `experts.gate_up_proj` and `experts.down_proj`.

    Raises:
        ValueError: If there are no experts, what was asked for is not there, a target would train a router, or an
            option would not reach the experts (DoRA, PiSSA, dropout and the like).
        TypeError: If `LoraConfig` has no such option.
    """
    lora_options.refuse_options(kwargs)
    if kwargs.get("target_parameters"):
        raise ValueError("expert_lora_config chooses target_parameters: use LoraConfig itself to name others.")
    named = kwargs.pop("target_modules", None) or []
    if isinstance(named, str):
        raise ValueError(
            f"target_modules must be a list of names, got {named!r}: a pattern (or 'all-linear', which takes the "
            "router in) cannot be joined with the experts."
        )
    model = lora_targets.base_model(model)
    layers = required_layers(model)
    chosen = lora_targets.LayerFilter(model, kwargs, named)
    experts = lora_targets.expert_parameters(model, layers, chosen)
    wanted = lora_targets.attention_modules(model, layers) if attention else set()
    wanted |= lora_targets.shared_expert_modules(model, layers) if shared_experts else set()
    modules, as_parameters = lora_targets.module_targets(model, {path for path in wanted if chosen(path)})
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        target_modules=[*modules, *named],
        target_parameters=[*experts, *as_parameters],
        **kwargs,
    )
    lora_targets.refuse_router_targets(config, model, layers)
    lora_targets.refuse_unused_patterns(config, model)
    return config


# PEFT compares the name of the class where it adds an adapter to a wrapped parameter
class ParamWrapper(peft_layer.ParamWrapper):
    """PEFT's wrapper of one expert projection (or of a linear layer's weight) whose forward keeps the factors apart.

    The wrappers of one experts module are nested; the outermost runs, and calls the experts with everybody's factors.
    """

    runs_low_rank = True

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's, where there are weights to add to.

        Raises:
            MergeError: If the weights are no dense tensors; nothing was changed then.
        """
        if is_experts(base := self.get_base_layer()) and (reason := _merge_refusal(base)) is not None:
            raise MergeError(reason)
        super().merge(safe_merge, adapter_names)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        base: Any = self.get_base_layer()
        # loops that torch.compile can trace
        factors: dict[str, LowRank] = {}
        wrapper: Any = self
        while isinstance(wrapper, peft_layer.ParamWrapper):
            low_rank = _active(wrapper)
            if low_rank is not None:
                factors[wrapper.parameter_name] = low_rank
            wrapper = wrapper.base_layer
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
    added to layers that had none. It swaps PEFT's wrappers in place, so everything that PEFT does with them still
    works, and files stay PEFT's. Adapters on weights of linear layers that were named in `target_parameters` run
    through their factors as well. Where one of transformers' own backends is set, `hf_moe` takes its place, for the
    base as well.

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
    if isinstance(storage := storage_of(layer.experts), UnreadableStorage):
        return storage.reason
    implementation = layer.experts.config._experts_implementation
    backend = BACKENDS.get(implementation or "eager")
    if backend is None or (backend.name in OURS and not backend.takes_low_rank):
        return _implementation_refuses(implementation)
    return None


def _is_served(wrapper: Any) -> bool:
    base = wrapper.get_base_layer()
    return is_experts(base) or (isinstance(base, nn.Linear) and wrapper.parameter_name == "weight")


def _choose_implementation(layers: list[MoeLayer]) -> None:
    """Set `hf_moe` where a backend of transformers is set, which is what transformers does unasked."""
    for layer in layers:
        config: Any = layer.experts.config
        if (backend := BACKENDS.get(config._experts_implementation or "eager")) and not backend.takes_low_rank:
            logger.info(
                "experts_implementation of %s: 'hf_moe' instead of %r, which takes no low-rank factors.",
                type(config).__name__,
                config._experts_implementation,
            )
            config._experts_implementation = "hf_moe"


# roundings that an output of a layer goes through, about: two weights, two products each for base and adapter, sums
_ROUNDINGS_PER_LAYER = 8
_SAFETY = 4


class MergeError(RuntimeError):
    """A merged model does not compute what the adapted one did."""


def _merge_refusal(experts: Any) -> str | None:
    storage = storage_of(experts)
    if storage.tensors() is not None:
        return None
    return (
        f"weights that are stored as {storage.format} cannot be merged into: load the base unquantised, or use the "
        "adapter unmerged."
    )


class _Outputs(NamedTuple):
    """The same batch through the base, the adapted and the merged model, float64."""

    base: Tensor
    adapted: Tensor
    merged: Tensor


def merge_and_check(peft_model: PeftModel, **batch: Any) -> nn.Module:
    """`peft_model.merge_and_unload()`, then check on `batch` that the merged model computes what the adapted one did.

    Experts that are stored as something else than dense tensors are refused before anything is changed.

    With the root mean square of the median token, `error` between merged and adapted outputs, `change` between
    adapted and base, `size` of the adapted, and `u` half a unit in the last place of the weights' dtype:

    - `error <= 4 * u * sqrt(8 * layers) * size`: a merge rounds every weight once, which is the same, relative to a
      product, as rounding the product; independent roundings of 8 operations a layer add up to their root, and 4 is
      for luck and for amplification. What is more is no rounding: the wrong delta was merged, or into the wrong
      place.
    - `error <= change / 2`: what the adapter does must survive. An update that is small beside the weights disappears
      in the rounding of 16-bit weights.

    The median, because rounding sends a few tokens to another expert; a wrong merge is wrong for all.

    Args:
        peft_model: Adapted and in memory; its active adapters are merged. It cannot be used afterwards.
        batch: What the model's forward takes, tokens that are typical for the adapter.

    Returns:
        The base model with merged weights, in the mode (training or evaluation) that it was in.

    Raises:
        MergeError: With the numbers and the way out. The weights are merged by then: load them again. If the weights
            are no dense tensors nothing was changed.
        TypeError: If the model is no `PeftModel`.
        ValueError: If the batch is empty, or an output is not finite.
    """
    if not isinstance(peft_model, PeftModel):
        raise TypeError(f"merge_and_check takes a PeftModel, got {type(peft_model).__name__}: use get_peft_model.")
    if not batch:
        raise ValueError("merge_and_check needs a batch to compare outputs on: pass input_ids=....")
    layers = required_layers(peft_model)
    for layer in layers:
        if (reason := _merge_refusal(layer.experts)) is not None:
            raise MergeError(f"{layer.experts_name}: {reason}")
    was_training = peft_model.training
    peft_model.eval()
    with peft_model.disable_adapter():
        base = _output(peft_model, batch)
    adapted = _output(peft_model, batch)
    dtype = storage_of(layers[0].experts).dtype
    merged: Any = peft_model.merge_and_unload()
    _check_merge(_Outputs(base, adapted, _output(merged, batch)), dtype, _num_layers(merged))
    return merged.train(was_training)


@torch.no_grad()
def _output(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    outputs = model(**batch)
    output = outputs.logits if "logits" in outputs else outputs[0]
    if not output.isfinite().all():
        raise ValueError("an output of the batch is not finite: choose another batch, or look at the adapter.")
    return output.double()


def _num_layers(model: Any) -> int:
    config = model.config.get_text_config() if hasattr(model, "config") else None
    return getattr(config, "num_hidden_layers", None) or len(moe_layers(model))


def _check_merge(outputs: _Outputs, dtype: torch.dtype, num_layers: int) -> None:
    size, change = _rms(outputs.adapted), _rms(outputs.adapted - outputs.base)
    error = _rms(outputs.merged - outputs.adapted)
    allowed = rounding_share(dtype, num_layers) * size
    numbers = (
        f"the merged outputs are off by {error:.3g} (median token), the adapter changes them by {change:.3g}, and "
        f"rounding to {str(dtype).removeprefix('torch.')} explains {allowed:.3g}"
    )
    if error > allowed:
        raise MergeError(
            f"{numbers}: this is no rounding: the wrong product was merged, or into the wrong place. Use the adapter "
            "unmerged."
        )
    if change > 0 and error > change / 2:
        raise MergeError(
            f"{numbers}: the adapter disappears in the rounding. Merge in float32: load the base with "
            "dtype=torch.float32, merge, then cast; or keep the adapter unmerged."
        )


def rounding_share(dtype: torch.dtype, num_layers: int) -> float:
    """How much of the size of a model's outputs rounding explains; see `merge_and_check` for the reasons."""
    unit = torch.finfo(dtype).eps / 2
    return _SAFETY * unit * (_ROUNDINGS_PER_LAYER * num_layers) ** 0.5


def _rms(values: Tensor) -> float:
    """Root mean square of the median row."""
    return values.square().mean(-1).flatten().quantile(0.5).sqrt().item()
