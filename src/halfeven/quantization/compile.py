"""Plain tensor functions as fused kernels of torch.compile: one for all shapes, cached on disk from run to run."""

import functools
import inspect
import logging
import os
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KERNELS = 64
"""Variants of one function that may be compiled, where this torch lets a limit be given."""

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_works: bool | None = None if os.environ.get("HALFEVEN_COMPILE", "1") != "0" else False


@functools.cache
def _compiled(function: types.FunctionType, variant: tuple[Any, ...] = ()) -> Callable[..., Any]:
    # Each device, autocast or inference mode and number of threads needs a kernel of its own: more than the compiler's
    # limit of eight in ordinary use. Past it a call runs unfused, and torch says so; with fullgraph=True it would
    # raise.
    known = "recompile_limit" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"recompile_limit": KERNELS} if known else {}
    # The compiler keeps kernels by the code object.
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return torch.compile(own, dynamic=True, **options)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one kernel of torch.compile; as it stands while a whole model is compiled or where no
    compiler is.

    The kernel is looked up by the ranks and types of tensors and by all other arguments but integers: with the kernels
    for all of them in one place the compiler would try one after the other, a third of a small call's time. A number
    that changes from call to call is given as a tensor.
    """
    if torch.compiler.is_compiling() or not compiler_works():
        return function

    def kernel(*arguments: Any) -> Any:
        # A kernel is compiled anew for each requires_grad and for each tensor that views another (its base is looked
        # at too): with learned scales that passes any limit. What autograd knows of the tensors is not needed here.
        bare = [a.data if isinstance(a, Tensor) else a for a in arguments]
        return _compiled(function, tuple(map(_kind, bare)))(*bare)

    return kernel


def _kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.ndim, argument.dtype
    if isinstance(argument, tuple):
        return _kinds(argument)
    return int if type(argument) is int else argument


@functools.cache
def _kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(map(_kind, arguments))


def compiler_works() -> bool:
    """Whether torch.compile can build kernels here; tried once on a small tensor. HALFEVEN_COMPILE=0 says no at
    once."""
    global _works
    with _lock:
        if _works is None:
            _works = _try_compiler()
    return _works


def _doubled(x: Tensor) -> Tensor:
    return x + x


def _try_compiler() -> bool:
    try:
        _compiled(_doubled)(torch.linspace(-1, 1, 64))
    except Exception as error:  # whatever a missing or broken toolchain raises: it is said, and nothing depends on it
        logger.warning(
            "torch.compile cannot build kernels here (%s), so fake-quantization runs unfused and training steps take "
            "longer; results are the same. Install a C++ compiler such as g++, or set HALFEVEN_COMPILE=0 to silence "
            "this.",
            str(error).strip().splitlines()[0],
        )
        return False
    return True
