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

MAX_KERNELS_PER_FUNCTION = 64
"""Largest number of compiled variants of a function, where this version of torch takes a limit."""

UNFUSED_NUMBERS = 2**29
"""Numbers that go through plain functions before kernels are built for them. The first kernels of a process take about
five seconds to build, about as long as a thread needs to fake-quantize so many numbers without them."""

logger = logging.getLogger(__name__)

_lock = threading.Lock()
_works: bool | None = None if os.environ.get("HALFEVEN_COMPILE", "1") != "0" else False
_unfused = 0  # numbers that `fused_once_worthwhile` has left to plain functions


@functools.cache
def _compile_variant(function: types.FunctionType, variant: tuple[Any, ...] = ()) -> Callable[..., Any]:
    # Each device, autocast mode, inference mode and number of threads needs a kernel of its own: in ordinary use more
    # than the eight that the compiler allows by default. Past the limit torch warns and runs the call unfused; with
    # fullgraph=True it would raise.
    known = "recompile_limit" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"recompile_limit": MAX_KERNELS_PER_FUNCTION} if known else {}
    # The compiler stores kernels by code object, so each variant gets a code object of its own.
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return torch.compile(own, dynamic=True, **options)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as one kernel of torch.compile; unchanged without a compiler, and inside a compiled model.

    The kernel is looked up by the ranks and types of the tensors and by all other arguments except integers: were all
    kernels in one place, the compiler would try one after the other, a third of the time of a small call. Give a number
    that changes from call to call as a tensor.

    Args:
        function: a plain function of tensors, without side effects except on its arguments.
    """
    if torch.compiler.is_compiling() or not compiler_works():
        return function

    def kernel(*arguments: Any) -> Any:
        # The compiler compiles anew for each requires_grad and for each tensor that is a view (it guards on the base
        # too): with learned scales that passes any limit. The kernel needs none of autograd's knowledge, so it gets
        # tensors without it.
        bare = [a.data if isinstance(a, Tensor) else a for a in arguments]
        return _compile_variant(function, tuple(map(_argument_kind, bare)))(*bare)

    return kernel


def fused_once_worthwhile(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Return the function as a kernel, or unchanged where a kernel would take longer to build than it saves.

    Quantizing a model once takes less time than building the kernels for it; training takes many steps. So the function
    is fused for a tensor whose gradient is needed, in a process that has built kernels before, and once
    `UNFUSED_NUMBERS` have gone through plain functions.

    Args:
        function: see `fused`; its results are the same with and without a kernel, bit for bit.
        x: the tensor that it is going to read.
    """
    global _unfused
    if torch.compiler.is_compiling() or _works is False:
        return function
    training = torch.is_grad_enabled() and x.requires_grad
    if not (training or _works) and _unfused < UNFUSED_NUMBERS:
        _unfused += x.numel()
        return function
    return fused(function)


def _argument_kind(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.ndim, argument.dtype
    if isinstance(argument, tuple):
        return _argument_kinds(argument)
    # With `dynamic=True` the compiler keeps integers as symbols, so their values make no new kernel. A bool is compiled
    # in, although Python counts it as an int.
    return int if type(argument) is int else argument


@functools.cache
def _argument_kinds(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(map(_argument_kind, arguments))


def compiler_works() -> bool:
    """Return True where torch.compile can build kernels: tried once, on a small tensor. HALFEVEN_COMPILE=0 is False."""
    # The lock is held while the compiler is tried: other threads wait for the answer.
    global _works
    with _lock:
        if _works is None:
            _works = _try_compiler()
    return _works


def _doubled(x: Tensor) -> Tensor:
    return x + x


def _try_compiler() -> bool:
    try:
        # `torch.compile` builds nothing by itself: a missing toolchain shows at the first call.
        _compile_variant(_doubled)(torch.linspace(-1, 1, 64))
    except Exception as error:  # a missing or broken toolchain raises many kinds: each is reported, none is fatal
        logger.warning(
            "torch.compile cannot build kernels here (%s), so fake-quantization runs unfused and training steps take "
            "longer; results are the same. Install a C++ compiler such as g++, or set HALFEVEN_COMPILE=0 to silence "
            "this.",
            str(error).strip().splitlines()[0],
        )
        return False
    return True
