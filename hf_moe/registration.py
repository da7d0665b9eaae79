"""The only side effects on other libraries. They add and never replace, and can be repeated.

Importing a modeling file costs as much as importing torch and transformers together, so the Auto classes get a
stand-in that imports it when a model is first built or loaded.
"""

import importlib
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_moe.models.configuration_hf_moe import HfMoeConfig

AUTO_CLASSES = {
    AutoModel: "HfMoeModel",
    AutoModelForCausalLM: "HfMoeForCausalLM",
    AutoModelForSequenceClassification: "HfMoeForSequenceClassification",
    AutoModelForTokenClassification: "HfMoeForTokenClassification",
    AutoModelForQuestionAnswering: "HfMoeForQuestionAnswering",
}


class LazyModelClass:
    """Stands for a class of `modeling_hf_moe` in the host's registry; what is asked of it is asked of the class."""

    config_class = HfMoeConfig  # the host checks it on registration, which must not import the modeling file

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_name":  # not set yet: while copying or unpickling
            raise AttributeError(attribute)
        return getattr(_register_models()[self._name], attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _register_models()[self._name](*args, **kwargs)


def register() -> None:
    """Make `hf_moe` known to the Auto classes: `AutoModel*` then needs neither a class name nor remote code."""
    AutoConfig.register(HfMoeConfig.model_type, HfMoeConfig, exist_ok=True)
    for auto_class, name in AUTO_CLASSES.items():
        auto_class.register(HfMoeConfig, LazyModelClass(name), exist_ok=True)


def _register_models() -> dict[str, type]:
    """Put the classes themselves in the place of their stand-ins."""
    modeling = importlib.import_module("hf_moe.models.modeling_hf_moe")
    classes = {name: getattr(modeling, name) for name in AUTO_CLASSES.values()}
    for auto_class, name in AUTO_CLASSES.items():
        auto_class.register(HfMoeConfig, classes[name], exist_ok=True)
    return classes
