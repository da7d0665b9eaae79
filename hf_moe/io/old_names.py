"""Old names of methods and arguments, which still work and say the new name in a FutureWarning."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_method(old: str, new: str) -> Callable[..., Any]:
    """A method `old` that calls the method `new`: `figures = renamed_method("figures", "metrics")`."""

    def call(self: Any, *args: Any, **options: Any) -> Any:
        name = type(self).__name__
        warnings.warn(f"{name}.{old} is now called {name}.{new}: use that.", FutureWarning, stacklevel=2)
        return getattr(self, new)(*args, **options)

    call.__doc__ = f"Old name of `{new}`."
    return call


def renamed_argument(old: str, new: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that passes the keyword argument `old` on as `new`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> R:
            if old in options:
                warnings.warn(f"the argument {old} is now called {new}: use that.", FutureWarning, stacklevel=2)
                # a call with both names fails as any call with an argument twice
                renamed: Any = {new: options.pop(old)}
                return function(*args, **renamed, **options)
            return function(*args, **options)

        return call

    return decorate
