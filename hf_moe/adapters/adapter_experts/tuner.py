"""Attach adapter experts to a model through PEFT, and make PEFT know them as a method."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from hf_moe.adapters.adapter_experts.config import AdapterExpertsConfig, AdapterExpertsType
from hf_moe.adapters.adapter_experts.layer import NO_MERGE, AdapterExpertsLayer
from hf_moe.layers.moe_layers import MoeLayer
from hf_moe.layers.unseen_experts import required_layers

PREFIX = "adapter_experts_"  # transformers builds it from the type's name when it deletes an adapter


def register_peft_method() -> None:
    """Make `AdapterExpertsConfig` known to PEFT; can be repeated.

    PEFT's own `register_peft_method` takes only the names of its enum; it fills these three tables.
    """
    key: Any = AdapterExpertsType.ADAPTER_EXPERTS
    PEFT_TYPE_TO_CONFIG_MAPPING[key] = AdapterExpertsConfig
    PEFT_TYPE_TO_TUNER_MAPPING[key] = AdapterExpertsModel
    PEFT_TYPE_TO_PREFIX_MAPPING[key] = PREFIX


class AdapterExpertsModel(BaseTuner):
    """PEFT's tuner: wraps the experts modules that `moe_layers` finds, and nothing else."""

    prefix = PREFIX
    tuner_layer_cls = AdapterExpertsLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT declares it so)

    def _prepare_adapter_config(self, peft_config: AdapterExpertsConfig, model_config: dict) -> AdapterExpertsConfig:
        """A copy that knows the base, so that one config object can be attached to several models."""
        dense = "Pass a Mixture-of-Experts model; peft.LoraConfig adapts dense ones."
        layers = required_layers(self.model, dense=dense)
        _refuse_unfit(self.model, layers)
        config = copy.copy(peft_config)
        config.attached_to({_place(layer): layer.hidden_size for layer in layers}, type(self.model).__name__)
        for name, known in list(self.peft_config.items()):
            if known is peft_config:
                self.peft_config[name] = config
        return config

    @staticmethod
    def _check_target_module_exists(peft_config: AdapterExpertsConfig, key: str) -> bool:
        return key in peft_config.target_modules

    def _create_and_replace(
        self,
        peft_config: AdapterExpertsConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, AdapterExpertsLayer):
            target.update_layer(adapter_name, peft_config)
            return
        assert peft_config.base_layers is not None
        layer = AdapterExpertsLayer(target, adapter_name, peft_config, peft_config.base_layers[current_key])
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # one more adapter, on layers that had none: not trained until it is active
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own also moves `weight`, which experts do not have

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT takes the adapters that remain from the first layer; here layers may have different ones."""
        active = [name for name in self.active_adapters if name != adapter_name]
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        remaining = active or list(self.peft_config)[:1]
        if was_active and remaining:
            self.set_adapter(remaining)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT would drop the argument and run the active adapter for every row."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter experts cannot mix adapters in one batch (adapter_names). Split the batch, and call "
                "set_adapter for each part."
            )
        yield


def _place(layer: MoeLayer) -> str:
    """Path of the layer's experts, or of the adapter layer around them."""
    name = layer.experts_name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return name


def _refuse_unfit(model: nn.Module, layers: list[MoeLayer]) -> None:
    """Refuse layers whose experts do not get each token once, or compute only a part of its sum."""
    processes = getattr(model, "_tp_size", None) or 1  # transformers sets it on models that it has split
    for layer in layers:
        if getattr(layer.experts.config, "routing", None) == "expert_choice":
            raise ValueError(
                f"{layer.name} has routing='expert_choice': its experts get a row for each of their choices, and a "
                "token would get the adapter's output once for each. Use expert LoRA."
            )
        # under expert parallelism the experts hold a part of what the router chooses among
        if processes > 1 or getattr(layer.experts, "num_experts", layer.num_experts) != layer.num_experts:
            raise ValueError(
                "adapter experts do not run under tensor or expert parallelism: each process would add their whole "
                "output, and transformers then sums over processes. Load the base whole on each process (without "
                "tp_plan)."
            )
