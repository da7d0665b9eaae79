"""Imports that wait: a stand-in for a class that is imported on first use, an action that follows a module's import.

They keep `import hf_moe` cheap. In CPU seconds (medians of three; transformers 5.23, torch 2.13), torch, transformers
and its Auto classes take 1.75, and `import hf_moe` adds 0.03. Registering at once would add 1.49 for transformers'
registry of experts implementations and 0.25 for the modeling file.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class LazyClass:
    """Stands for a model class in the registry of an Auto class; what is asked of it is asked of the class.

    Args:
        load: Imports the class and returns it.
        config_class: The class's own; transformers reads it on registration, which must not import the class.
    """

    def __init__(self, load: Callable[[], type], config_class: type):
        self._load = load
        self.config_class = config_class

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_load":  # not set yet: while copying or unpickling
            raise AttributeError(attribute)
        return getattr(self._load(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        """For `class Mine(AutoModel._model_mapping[HfMoeConfig])`."""
        return (self._load(),)


def after_import(module: str, action: Callable[[], None]) -> None:
    """Call `action` right after `module` is imported, or now if it is already; asking twice is asking once."""
    if module in sys.modules:
        action()
    elif not any(isinstance(finder, _AfterImport) and finder.waits_for(module, action) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(module, action))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Waits for the import of `module`, lets the usual loader do it, then calls `action` and is gone.

    A question whether the module is installed (`importlib.util.find_spec`) comes here too, and changes nothing.
    """

    def __init__(self, module: str, action: Callable[[], None]):
        self.module, self.action = module, action

    def waits_for(self, module: str, action: Callable[[], None]) -> bool:
        return (self.module, self.action) == (module, action)

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
