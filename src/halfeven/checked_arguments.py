"""The door of public functions: arguments are what their annotations say, and only halfeven's own errors come out.

torch, the runtimes and the libraries of models raise errors of many kinds, which say where they noticed that something
was wrong and not what the caller gave. They stay as the cause (`__cause__`) of an error that does.
"""

import collections.abc
import functools
import inspect
import numbers
import os
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin

from torch import Tensor, nn

from halfeven import options
from halfeven.errors import ConfigError, HalfevenError, last_line
from halfeven.files import storage_error
from halfeven.nearest import shown

P = ParamSpec("P")
R = TypeVar("R")

WORDS_FOR_TYPES: dict[Any, str] = {
    nn.Module: "a model (torch.nn.Module)",
    Tensor: "a tensor",
    Path: "a path",
    collections.abc.Iterable: "a loader, a list or something else to iterate over",
    collections.abc.Callable: "a function",
    types.NoneType: "None",
}
"""Words for what an argument must be, beside those of options."""
ORIGINS_OF_OPTIONS: tuple[Any, ...] = (tuple, Annotated)
"""Origins of annotations that options have too, and know how to check."""
MAX_SHOWN_LETTERS = 60
"""Largest number of letters of a value in a message."""


def checked_arguments(error: type[HalfevenError]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator of a public function that checks its arguments and turns raw errors into halfeven's.

    A call with missing or unknown arguments is Python's own TypeError. Warnings that a filter makes errors pass.

    Args:
        error: the class of an error that stands for a raw one.

    Raises:
        ConfigError: an argument is not what its annotation says.
        HalfevenError: `error`, for any raw error; a `StorageError` for an error of the operating system.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                given = dict(signature.bind(*args, **kwargs).arguments)
            except TypeError:  # Python says it with the function's name
                return function(*args, **kwargs)
            _check_arguments(function, signature, given)
            try:
                return function(*args, **kwargs)
            except (HalfevenError, Warning):
                raise
            except Exception as raw:
                raise _translated_error(function.__qualname__, given, raw, error) from raw

        return call

    return decorate


def _check_arguments(function: Callable[..., Any], signature: inspect.Signature, given: Mapping[str, Any]) -> None:
    hints = _type_hints(function)
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for name, value in given.items():
        several = signature.parameters[name].kind in variable
        # Keywords of `**changes` are left to the option classes, which check each field.
        values = [] if signature.parameters[name].kind is variable[0] else value if several else [value]
        for one in values:
            if name in hints and not argument_fits(hints[name], one):
                raise ConfigError(
                    f"{function.__qualname__}() cannot use {name}: it is {described(one)}, and must be "
                    f"{_expected(hints[name])}. Nothing was done."
                    f"{_advice_for(hints[name], one) or _argument_meant(hints, given, one)}"
                )


def _argument_meant(hints: Mapping[str, Any], given: Mapping[str, Any], value: Any) -> str:
    """Return a sentence that names the argument for batches, where a value would be those; "" for any other value."""
    if isinstance(value, Tensor):
        return ""
    of_batches = [name for name, kind in hints.items() if _holds_batches(kind)]
    fitting = [name for name in of_batches if name not in given and argument_fits(hints[name], value)]
    return f" Did you mean {fitting[0]}?" if fitting else ""


def _holds_batches(kind: Any) -> bool:
    return any(get_origin(one) is collections.abc.Iterable for one in (kind, *get_args(kind)))


@functools.cache
def _type_hints(function: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(function, include_extras=True)


def argument_fits(kind: Any, value: Any) -> bool:
    """Return True where a value satisfies an annotation: its type, choices and bounds, or the use it must allow."""
    origin = get_origin(kind)
    arguments = get_args(kind)
    # What a type variable or a name in quotes stands for is not known here.
    if kind is Any or isinstance(kind, TypeVar | str):
        return True
    if origin in (Union, types.UnionType):
        return any(argument_fits(member, value) for member in arguments)
    if origin is collections.abc.Callable or kind is collections.abc.Callable:
        return callable(value)
    if origin in (collections.abc.Mapping, dict):
        key, item = arguments
        known = isinstance(value, origin)
        return known and all(argument_fits(key, name) and argument_fits(item, one) for name, one in value.items())
    if origin is collections.abc.Sequence:
        several = isinstance(value, collections.abc.Sequence) and not isinstance(value, str | bytes)
        return several and all(argument_fits(arguments[0], one) for one in value)
    if origin is collections.abc.Iterable:
        if isinstance(value, str | bytes | Mapping | nn.Module):
            return False
        # Python also iterates over what can only be indexed, such as a data set.
        return isinstance(value, Iterable) or hasattr(value, "__getitem__")
    if origin is tuple and arguments[-1] is Ellipsis and arguments[0] is Any:
        return isinstance(value, tuple | list)  # an example's arguments
    if kind is Path:
        return isinstance(value, os.PathLike)
    # numpy's scalars are numbers too, and options know Python's alone.
    if type(value).__module__ == "numpy" and isinstance(value, numbers.Number):
        return options.fits(kind, value.item())  # type: ignore[attr-defined]
    if isinstance(origin, type) and origin not in ORIGINS_OF_OPTIONS:
        return isinstance(value, origin)
    return options.fits(kind, value)


def _expected(kind: Any) -> str:
    """Return the words for the values that an annotation allows."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    words = list(dict.fromkeys(_expected_of_one(member) for member in members))
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]


def _expected_of_one(kind: Any) -> str:
    origin = get_origin(kind)
    arguments = get_args(kind)
    if (known := WORDS_FOR_TYPES.get(origin or kind)) is not None:
        return known
    if origin in (collections.abc.Mapping, dict):
        return "a dict" if Any in arguments else f"a dict of {_expected(arguments[0])} to {_expected(arguments[1])}"
    if origin is collections.abc.Sequence:
        return f"a list or tuple, each of it {_expected(arguments[0])}"
    if origin is tuple and Any in arguments:
        return "a tuple"
    if isinstance(origin, type) and origin not in ORIGINS_OF_OPTIONS:
        return f"{origin.__name__}(...)"
    return options.describe(kind)


def described(value: Any) -> str:
    """Describe a value: its type, with shape and dtype, or with itself where it is short."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a {'' if isinstance(value, nn.Parameter) else str(value.device) + ' '}tensor {_dtype_and_shape(value)}"
    if type(value).__module__ == "numpy" and hasattr(value, "shape"):
        return f"a numpy {name} {_dtype_and_shape(value)}"
    if isinstance(value, str | int | float | os.PathLike) and len(shown(value)) <= MAX_SHOWN_LETTERS:
        return f"{_with_article(name)} {shown(value)}"
    if isinstance(value, list | tuple | dict | set):
        return f"{_with_article(name)} of {len(value)}"
    return _with_article(name)


def _dtype_and_shape(value: Any) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _advice_for(kind: Any, value: Any) -> str:
    """Return a sentence for mistakes that are made often, with a space before it; "" for any other."""
    takes = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if type(value).__module__ == "numpy" and Tensor in takes:
        return " Make it a tensor with torch.from_numpy(...)."
    if isinstance(value, type) and nn.Module in takes and issubclass(value, nn.Module):
        return f" Make a model of the class: {value.__name__}(...)."
    if isinstance(getattr(value, "__self__", None), nn.Module) and nn.Module in takes:
        return " Give the model that the method belongs to."
    if isinstance(value, Tensor | Mapping) and get_origin(kind) is collections.abc.Iterable:
        return " Put a single batch into a list: [batch]."
    return ""


def _translated_error(name: str, given: Mapping[str, Any], raw: Exception, error: type[HalfevenError]) -> HalfevenError:
    """Return halfeven's error for an error of another library."""
    if isinstance(raw, OSError) and raw.errno is not None:
        return storage_error(raw)
    arguments = ", ".join(f"{key}={described(value)}" for key, value in given.items() if key != "self")
    return error(
        f"{name}() ended with {type(raw).__name__}: {last_line(raw)}\nThat came from {_raising_line(raw)}, and no "
        f"result was made. The arguments were {arguments}. Check them; if they are right, this is a fault of halfeven: "
        "report it with the whole traceback."
    )


def _raising_line(raw: Exception) -> str:
    """Return the line that raised an error, and the last line before it that is in no installed package."""
    frames = traceback.extract_tb(raw.__traceback__)
    own = [frame for frame in frames[:-1] if "site-packages" not in frame.filename]
    known = [frames[-1], *own[-1:]] if "site-packages" in frames[-1].filename else frames[-1:]
    return ", called from ".join(f"{Path(frame.filename).name}:{frame.lineno} ({frame.name})" for frame in known)
