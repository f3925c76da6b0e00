"""Old names of parameters, functions and classes, which still work for this version, with a warning that names the new.

Old names of whole modules are in `halfeven.moved`.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed_parameters(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that lets callers use old names of keyword parameters, with a warning.

    Args:
        new_names: old name -> new name, for example `say="log"`.

    Raises:
        TypeError: a call gives a parameter by its old and its new name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in [name for name in kwargs if name in new_names]:
                _rename_keyword(function.__name__, kwargs, old, new_names[old])
            return function(*args, **kwargs)

        return call

    return decorate


def _rename_keyword(function: str, kwargs: dict[str, Any], old: str, new: str) -> None:
    if new in kwargs:
        raise TypeError(f"{function}() got {new}= twice, once by its old name {old}=. Leave {old}= out.")
    _warn_of_new_name(f"The parameter {old}= of {function}()", f"{new}=", stacklevel=4)
    kwargs[new] = kwargs.pop(old)


def renamed_attributes(module: str, **new_names: str) -> Callable[[str], Any]:
    """Return a module's `__getattr__`, which finds old names of functions and classes in their new places.

    Args:
        module: the module's `__name__`.
        new_names: old name -> new dotted name below `halfeven`, for example `choose="ptq.recipe.decide"`.
    """

    def find(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module '{module}' has no attribute '{name}'")
        place, _, new = new_names[name].rpartition(".")
        _warn_of_new_name(f"{module}.{name}", f"halfeven.{new_names[name]}", stacklevel=3)
        return getattr(importlib.import_module(f"halfeven.{place}"), new)

    return find


def _warn_of_new_name(old: str, new: str, stacklevel: int) -> None:
    text = f"{old} is {new} now; the old name goes with the next version."
    warnings.warn(text, DeprecationWarning, stacklevel=stacklevel)
