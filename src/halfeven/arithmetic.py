"""The arithmetic of uniform quantization, as pure functions on tensors.

An integer is `clamp(round(x / scale) + zero_point, quant_min, quant_max)`, rounded to nearest with ties to even, and
stands for `(integer - zero_point) * scale` ("A White Paper on Neural Network Quantization", arXiv 2106.08295, section
2.2).
"""

import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from halfeven.scheme import Scheme

SIGNIFICAND_BITS = 16
"""Scales keep this many significand bits, so that (scale, zero_point) -> (low, high) -> scale is lossless in
float32."""

SMALLEST_SCALE = 2.0**-40
"""No scale is smaller: products of two scales and their reciprocals stay normal float32 numbers."""

logger = logging.getLogger(__name__)


def snap(scale: Tensor) -> Tensor:
    """Round float32 scales to 16 significand bits (ties to even); the shape stays."""
    dropped = 24 - SIGNIFICAND_BITS
    bits = scale.detach().float().view(torch.int32)
    half = (1 << (dropped - 1)) - 1
    bits = (bits + half + ((bits >> dropped) & 1)) & ~((1 << dropped) - 1)
    return bits.view(torch.float32)


def effective_scale(scale: Tensor) -> Tensor:
    """The scale that is used for a stored one: its absolute value, at least `SMALLEST_SCALE`, snapped to 16 bits.

    The absolute value keeps a learned scale positive without a dead zone: one that crosses zero is reflected, and its
    gradient with it. Snapping passes the gradient through.
    """
    result = _EffectiveScale.apply(scale)
    assert isinstance(result, Tensor)
    return result


class _EffectiveScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return snap(scale.detach().abs().clamp(min=SMALLEST_SCALE))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (scale,) = ctx.saved_tensors
        return torch.where(scale < 0, -gradients[0], gradients[0])


def scale_and_zero_point(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a float range; zero lies exactly on the grid, the zero point is an integer inside it.

    A dead channel (an empty range at zero) takes the largest scale of its neighbours, or 1 / quant_max where all are
    dead.

    Args:
        low, high: ends of the range, shape [] or [channels], float32; widened to contain 0.
        scheme: the grid.

    Returns:
        scale (float32, snapped) and zero_point (int32), shaped like `low`.
    """
    low, high = low.float().clamp(max=0.0), high.float().clamp(min=0.0)
    if scheme.symmetric:
        largest = torch.maximum(-low, high) if scheme.signed else high
        scale = largest / scheme.quant_max
    else:
        scale = (high - low) / (scheme.quant_max - scheme.quant_min)
    alive = scale > SMALLEST_SCALE
    fallback = torch.where(alive, scale, 0.0).amax()
    fallback = torch.where(fallback > 0, fallback, 1.0 / scheme.quant_max)
    scale = snap(torch.where(alive, scale, fallback))
    if scheme.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = scheme.quant_min - torch.round(low / scale)
    return scale, zero_point.clamp(scheme.quant_min, scheme.quant_max).to(torch.int32)


def per_channel(values: Tensor, axis: int | None, ndim: int) -> Tensor:
    """Shape per-channel values [channels] so that they broadcast over a tensor with `ndim` axes; scalars stay."""
    if axis is None:
        return values
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Integers of `x` on the scheme's grid, as float32 (exact up to 2^24), shaped like `x`."""
    scale = per_channel(scale, scheme.axis, x.ndim)
    zero_point = per_channel(zero_point, scheme.axis, x.ndim)
    return torch.clamp(torch.round(x.float() / scale) + zero_point, scheme.quant_min, scheme.quant_max)


def dequantize(integers: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Real values of integers: (integer - zero_point) * scale."""
    scale = per_channel(scale, scheme.axis, integers.ndim)
    return (integers - per_channel(zero_point, scheme.axis, integers.ndim)) * scale


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, gradient_factor: float = 1.0) -> Tensor:
    """Quantize and dequantize, with the gradients of learned step size quantization (LSQ, arXiv 1902.08153).

    x gets the gradient inside the grid and 0 outside (straight-through). The scale gets `round(x/s) - x/s` inside and
    `bound - zero_point` outside, summed over the elements that share it, times `gradient_factor`.

    Args:
        x: any shape, floating.
        scale: [] or [channels], positive float32.
        zero_point: like `scale`, integers.
        scheme: grid and axis.
        gradient_factor: LSQ's gradient scale, 1 / sqrt(elements * quant_max).
    """
    result = _FakeQuantize.apply(x, scale, zero_point, scheme, gradient_factor)
    assert isinstance(result, Tensor)
    return result


def _forward(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    integers = torch.clamp(torch.round(x.float() / scale) + zero_point, low, high)
    return ((integers - zero_point) * scale).to(x.dtype)


def _backward_input(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    rounded = torch.round(x.float() / scale) + zero_point
    return torch.where((rounded >= low) & (rounded <= high), grad, 0.0)


def _backward_all(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the scale; the latter summed over the last axis."""
    ratio = x.float() / scale
    rounded = torch.round(ratio)
    shifted = rounded + zero_point
    inside = (shifted >= low) & (shifted <= high)
    slope = torch.where(inside, rounded - ratio, torch.clamp(shifted, low, high) - zero_point)
    return torch.where(inside, grad, 0.0), (grad.float() * slope).sum(-1)


class _FakeQuantize(torch.autograd.Function):
    """Saves only its input: the integers are computed again in the backward pass, where they cost nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme, gradient_factor: float
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.scheme, ctx.gradient_factor = scheme, gradient_factor
        rows, restore = _rows(x, scheme.axis)
        column = _columns(scale, zero_point, scheme.axis)
        return restore(fused(_forward)(rows, *column, scheme.quant_min, scheme.quant_max))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        rows, restore = _rows(x, scheme.axis)
        grad = _rows(_laid_out_like(gradients[0], x), scheme.axis)[0]
        arguments = (grad, rows, *_columns(scale, zero_point, scheme.axis), scheme.quant_min, scheme.quant_max)
        if not ctx.needs_input_grad[1]:
            return restore(fused(_backward_input)(*arguments)), None, None, None, None
        grad_rows, grad_scale = fused(_backward_all)(*arguments)
        return restore(grad_rows), grad_scale.reshape(scale.shape) * ctx.gradient_factor, None, None, None


def _laid_out_like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient with the strides of the input, so that both flatten in the same order."""
    if x.is_contiguous():
        return grad.contiguous()
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return grad.contiguous(memory_format=torch.channels_last)
    return grad


def _rows(x: Tensor, axis: int | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """View `x` as [elements] or [channels, elements], so that one kernel serves every shape; and the way back."""
    if axis is not None:
        moved = x.movedim(axis, 0)
        shape = moved.shape
        return moved.reshape(shape[0], -1), lambda rows: rows.reshape(shape).movedim(0, axis)
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        moved = x.permute(0, 2, 3, 1)  # the order in memory: flattening copies nothing
        return moved.reshape(-1), lambda rows: rows.reshape(moved.shape).permute(0, 3, 1, 2)
    return x.reshape(-1), lambda rows: rows.reshape(x.shape)


def _columns(scale: Tensor, zero_point: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    return (scale.reshape(-1, 1), zero_point.reshape(-1, 1)) if axis is not None else (scale, zero_point)


KERNELS = 64
"""Variants of one function that may be compiled, where this torch lets a limit be given."""

_compiler_lock = threading.Lock()
_compiler_works: bool | None = None if os.environ.get("HALFEVEN_COMPILE", "1") != "0" else False


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # Each rank, dtype, device, autocast or inference mode and number of threads needs a kernel of its own: more than
    # the compiler's limit of eight in ordinary use. Past it a call runs unfused, and torch says so; with fullgraph=True
    # it would raise.
    known = "recompile_limit" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"recompile_limit": KERNELS} if known else {}
    return torch.compile(function, dynamic=True, **options)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as one kernel of torch.compile; as it stands while a whole model is compiled or where no
    compiler is."""
    if torch.compiler.is_compiling() or not compiler_works():
        return function
    # A kernel is compiled anew for each requires_grad and for each tensor that views another (its base is looked at
    # too): with learned scales that passes the compiler's limit of eight, an error. What autograd knows of the tensors
    # is not needed here.
    kernel = _compiled(function)
    return lambda *arguments: kernel(*(a.data if isinstance(a, Tensor) else a for a in arguments))


def compiler_works() -> bool:
    """Whether torch.compile can build kernels here; tried once on a small tensor. HALFEVEN_COMPILE=0 says no at
    once."""
    global _compiler_works
    with _compiler_lock:
        if _compiler_works is None:
            _compiler_works = _try_compiler()
    return _compiler_works


def _try_compiler() -> bool:
    x = torch.linspace(-1, 1, 64)
    try:
        _compiled(_forward)(x, torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), -127, 127)
    except Exception as error:  # whatever a missing or broken toolchain raises: it is said, and nothing depends on it
        logger.warning(
            "torch.compile cannot build kernels here (%s), so fake-quantization runs unfused and training steps take "
            "longer; results are the same. Install a C++ compiler such as g++, or set HALFEVEN_COMPILE=0 to silence "
            "this.",
            str(error).strip().splitlines()[0],
        )
        return False
    return True
