"""The only side effects on other libraries. They add and never replace, can be repeated, and refuse unknown versions.

Importing a modeling file costs as much as importing torch and transformers together. So the Auto classes get a
stand-in that imports ours when a model is first built or loaded, and the experts implementations are registered when
the first modeling file of the host imports the registry that they go into. In the same way PEFT learns of our adapters
when it is imported.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
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
from hf_moe.models.transformers_names import check_parameters, unknown

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

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        """For `class Mine(AutoModel._model_mapping[HfMoeConfig])`."""
        return (_register_models()[self._name],)


def register() -> None:
    """Make `hf_moe` known to the Auto classes, our experts implementations to the host and our adapters to PEFT.

    `AutoModel*` and `PeftModel.from_pretrained` then need neither a class name nor remote code.
    """
    AutoConfig.register(HfMoeConfig.model_type, HfMoeConfig, exist_ok=True)
    for auto_class, name in AUTO_CLASSES.items():
        auto_class.register(HfMoeConfig, LazyModelClass(name), exist_ok=True)
    for module, register_ours in _ON_IMPORT_OF.items():
        if module in sys.modules:
            register_ours()
        elif not any(isinstance(finder, _AfterImport) and finder.module == module for finder in sys.meta_path):
            sys.meta_path.insert(0, _AfterImport(module, register_ours))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Waits for the import of `module`, lets the usual loader do it, then calls `action` and is gone.

    A question whether the module is installed (`importlib.util.find_spec`) comes here too, and changes nothing.
    """

    def __init__(self, module: str, action: Callable[[], None]):
        self.module, self.action = module, action

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        finders = list(sys.meta_path)
        if fullname != self.module or self not in finders:
            return None
        # those after this one: the import has asked those before it
        specs = (finder.find_spec(fullname, path, target) for finder in finders[finders.index(self) + 1 :])
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    """The usual loader, whatever is asked of it, and after the import the finder's action."""

    def __init__(self, usual: Any, finder: _AfterImport):
        self._usual, self._finder = usual, finder

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._usual
        self._usual.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        self._finder.action()

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._usual, attribute)


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


def _register_adapters() -> None:
    importlib.import_module("hf_moe.adapters.adapter_experts.tuner").register_peft_method()


# what is registered where, as soon as it is there
EXPERTS_REGISTRY = "transformers.integrations.moe"
_ON_IMPORT_OF = {EXPERTS_REGISTRY: _register_backends, "peft": _register_adapters}


def _register_models() -> dict[str, type]:
    """Put the classes themselves in the place of their stand-ins."""
    modeling = importlib.import_module("hf_moe.models.modeling_hf_moe")
    classes = {name: getattr(modeling, name) for name in AUTO_CLASSES.values()}
    for auto_class, name in AUTO_CLASSES.items():
        auto_class.register(HfMoeConfig, classes[name], exist_ok=True)
    return classes
