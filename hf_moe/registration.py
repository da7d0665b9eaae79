"""The only side effects on other libraries. They add and never replace, and can be repeated.

Importing a modeling file costs as much as importing torch and transformers together. So the Auto classes get a
stand-in that imports ours when a model is first built or loaded, and the experts implementations are registered when
the first modeling file of the host imports the registry that they go into.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
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
    if EXPERTS_REGISTRY in sys.modules:
        _register_backends()
    elif not any(isinstance(finder, _AfterExpertsRegistry) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterExpertsRegistry())


EXPERTS_REGISTRY = "transformers.integrations.moe"


class _AfterExpertsRegistry(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Waits for the import of the host's experts registry, lets the usual loader do it, then registers ours."""

    _loader: importlib.abc.Loader

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != EXPERTS_REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register_backends()


def _register_backends() -> None:
    interface = sys.modules[EXPERTS_REGISTRY].ExpertsInterface
    for backend in importlib.import_module("hf_moe.experts.backends").OURS:
        interface.register(backend.name, backend.forward)


def _register_models() -> dict[str, type]:
    """Put the classes themselves in the place of their stand-ins."""
    modeling = importlib.import_module("hf_moe.models.modeling_hf_moe")
    classes = {name: getattr(modeling, name) for name in AUTO_CLASSES.values()}
    for auto_class, name in AUTO_CLASSES.items():
        auto_class.register(HfMoeConfig, classes[name], exist_ok=True)
    return classes
