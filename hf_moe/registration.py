"""The only side effects on other libraries: they add and never replace, can be repeated, refuse unknown versions."""

import importlib
import sys
from functools import partial

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_moe.lazy_imports import LazyClass, after_import
from hf_moe.models.configuration_hf_moe import HfMoeConfig
from hf_moe.models.transformers_names import check_parameters, unknown

AUTO_CLASSES = {
    AutoModel: "HfMoeModel",
    AutoModelForCausalLM: "HfMoeForCausalLM",
    AutoModelForSequenceClassification: "HfMoeForSequenceClassification",
    AutoModelForTokenClassification: "HfMoeForTokenClassification",
    AutoModelForQuestionAnswering: "HfMoeForQuestionAnswering",
}
EXPERTS_REGISTRY = "transformers.integrations.moe"
FP8_REGISTRY = "transformers.integrations.finegrained_fp8"


def register() -> None:
    """Make `hf_moe` known to the Auto classes, our experts implementations to transformers and our adapters to PEFT.

    `AutoModel*` and `PeftModel.from_pretrained` then need neither a class name nor remote code.
    """
    AutoConfig.register(HfMoeConfig.model_type, HfMoeConfig, exist_ok=True)
    for auto_class, name in AUTO_CLASSES.items():
        auto_class.register(HfMoeConfig, LazyClass(partial(_model_class, name), HfMoeConfig), exist_ok=True)
    after_import(EXPERTS_REGISTRY, _register_backends)
    after_import(FP8_REGISTRY, _register_fp8_backends)
    after_import("peft", _register_adapters)


def _model_class(name: str) -> type:
    """The class itself; from now on the Auto classes have all of them in place of the stand-ins."""
    modeling = importlib.import_module("hf_moe.models.modeling_hf_moe")
    for auto_class, class_name in AUTO_CLASSES.items():
        auto_class.register(HfMoeConfig, getattr(modeling, class_name), exist_ok=True)
    return getattr(modeling, name)


def _register_backends() -> None:
    registry = sys.modules[EXPERTS_REGISTRY]
    for name in ("ExpertsInterface", "use_experts_implementation"):
        if not hasattr(registry, name):
            raise unknown(f"{EXPERTS_REGISTRY} has no {name}")
    interface = registry.ExpertsInterface
    check_parameters({interface.register: ("key", "value"), registry.use_experts_implementation: ("experts_class",)})
    backends = importlib.import_module("hf_moe.experts.backends")
    for name in backends.OURS:
        interface.register(name, backends.forward_of(name))


def _register_fp8_backends() -> None:
    """The same names for fp8 experts, which transformers looks up in a registry of their own."""
    registry = sys.modules[FP8_REGISTRY]
    if not hasattr(registry, "FP8ExpertsInterface"):
        raise unknown(f"{FP8_REGISTRY} has no FP8ExpertsInterface")
    interface = registry.FP8ExpertsInterface
    check_parameters({interface.register: ("key", "value")})
    backends = importlib.import_module("hf_moe.experts.backends")
    for name in backends.OURS:
        interface.register(name, backends.forward_of(name))


def _register_adapters() -> None:
    importlib.import_module("hf_moe.adapters.adapter_experts.tuner").register_peft_method()
