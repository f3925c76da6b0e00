"""Fake-quantization, differentiable, in one fused pass forward and one backward, with a clip fused into it.

Gradients are those of learned step size quantization: LSQ (arXiv 1902.08153) for the scale, LSQ+ (arXiv 2004.09576) for
the zero point, which stays an integer of the grid here.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from halfeven.quantization.arithmetic import SMALLEST_EXPONENT, per_channel, snap
from halfeven.quantization.compile import fused
from halfeven.quantization.scheme import Scheme

Domain = Literal["linear", "log"]
"""How a learned scale is stored: as itself, used by its absolute value, or as its binary logarithm."""

Clip = tuple[float, float]
"""The bounds of an activation that clips, such as (0, inf) of ReLU, before it is quantized."""

UNCLIPPED: Clip = (-math.inf, math.inf)


def effective_scale(stored: Tensor, domain: Domain = "linear") -> Tensor:
    """The scale that is used for a stored one: positive, at least `arithmetic.SMALLEST_SCALE`, snapped to 16 bits.

    In the linear domain the absolute value keeps a learned scale positive without a dead zone: one that crosses zero is
    reflected, and its gradient with it. Snapping passes the gradient through.
    """
    positive = torch.exp2(stored) if domain == "log" else torch.where(stored < 0, -stored, stored)
    # A power of an integer: the compiler builds it into a kernel. A floating-point constant of a module would be an
    # argument, which every call makes a tensor of.
    least = 2.0**SMALLEST_EXPONENT
    # The first summand carries the gradient and is exactly 0.
    return (positive - positive.detach()) + snap(positive.detach().clamp(min=least))


def stored_scale(scale: Tensor, domain: Domain) -> Tensor:
    """What is stored for a positive scale; `effective_scale` gives it back."""
    return torch.log2(scale) if domain == "log" else scale


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    scheme: Scheme,
    gradient_factor: float = 1.0,
    *,
    domain: Domain | None = None,
    clip: Clip = UNCLIPPED,
    rounding_gradient: bool = True,
    known: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize, with the gradients of learned step size quantization.

    x gets the gradient inside the grid and 0 outside (straight-through). The scale gets `round(x/s) - x/s` inside and
    `bound - zero_point` outside, a floating zero point 0 inside and `-scale` outside, each summed over the elements
    that share it, times `gradient_factor`.

    Args:
        x: any shape, floating.
        scale: [] or [channels], float32: positive, or as `domain` says.
        zero_point: like `scale`; integers, or a learned one in float32, which is rounded and clamped to the grid.
        scheme: grid and axis.
        gradient_factor: LSQ's gradient scale, 1 / sqrt(elements * quant_max).
        domain: how a learned scale is stored; None: `scale` is used as it is.
        clip: bounds that x is clipped to first, at no cost; the same as a clamp before.
        rounding_gradient: whether the scale gets the gradient of rounding inside the grid (LSQ); False: of clipping
            alone (PACT, arXiv 1805.06085).
        known: the result, where it is known from before; then only the backward pass computes.
    """
    # A kernel sees [elements] or [channels, elements], but in a model that is compiled as a whole.
    axis = scheme.axis if scheme.axis is None or torch.compiler.is_compiling() else 0
    grid = _Grid(scheme.quant_min, scheme.quant_max, axis, domain, clip, rounding_gradient)
    ends_at_zero = scheme.symmetric and not scheme.signed and clip[0] == 0  # then the grid is the lower bound already
    forward = grid._replace(clip=(-math.inf, clip[1])) if ends_at_zero else grid
    result = _FakeQuantize.apply(x, scale, zero_point, scheme.axis, forward, grid, gradient_factor, known)
    assert isinstance(result, Tensor)
    return result


class _Grid(NamedTuple):
    """What a kernel is compiled for, but for the integers, which are its arguments."""

    low: int
    high: int
    axis: int | None
    """That of the channels, along which `scale` and `zero_point` lie, in the tensor as the kernel sees it."""
    domain: Domain | None
    clip: Clip
    rounding: bool


def _used(scale: Tensor, zero_point: Tensor, ndim: int, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point in use, in float32, to broadcast over a tensor with `ndim` axes."""
    if grid.domain is not None:
        scale = effective_scale(scale, grid.domain)
    if zero_point.is_floating_point():
        zero_point = torch.clamp(torch.round(zero_point), grid.low, grid.high)
    return per_channel(scale, grid.axis, ndim), per_channel(zero_point.float(), grid.axis, ndim)


def _clipped(x: Tensor, clip: Clip) -> Tensor:
    """A clamp as two selections, which the compiler makes faster code of; NaN stays NaN."""
    low, high = clip
    x = torch.where(x < low, low, x) if low > -math.inf else x
    return torch.where(x > high, high, x) if high < math.inf else x


def _forward(x: Tensor, scale: Tensor, zero_point: Tensor, grid: _Grid) -> Tensor:
    used, zero = _used(scale, zero_point, x.ndim, grid)
    integers = torch.clamp(torch.round(_clipped(x.float(), grid.clip) / used) + zero, grid.low, grid.high)
    return ((integers - zero) * used).to(x.dtype)


def _passed(grad: Tensor, x: Tensor, inside: Tensor, clip: Clip) -> Tensor:
    """The gradient where it goes through: inside the grid, and inside the clip."""
    low, high = clip
    inside = inside & (x > low) if low > -math.inf else inside
    inside = inside & (x < high) if high < math.inf else inside
    return torch.where(inside, grad, 0.0)


def _backward_input(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, grid: _Grid) -> tuple[Tensor]:
    """The gradient of the input alone."""
    used, zero = _used(scale, zero_point, x.ndim, grid)
    shifted = torch.round(x.float() / used) + zero
    return (_passed(grad, x, (shifted >= grid.low) & (shifted <= grid.high), grid.clip),)


def _backward_scale(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, grid: _Grid) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the stored scale; the latter summed over the axes that share it."""
    used, zero = _used(scale, zero_point, x.ndim, grid)
    ratio = _clipped(x.float(), grid.clip) / used
    shifted = torch.round(ratio) + zero
    inside = (shifted >= grid.low) & (shifted <= grid.high)
    clipped = torch.clamp(shifted, grid.low, grid.high) - zero
    slope = torch.where(inside, shifted - zero - ratio if grid.rounding else 0.0, clipped)
    total = (grad.float() * slope).sum_to_size(used.shape)
    if grid.domain == "log":
        total = total * (used * math.log(2))
    elif grid.domain == "linear":
        total = torch.where(per_channel(scale, grid.axis, x.ndim) < 0, -total, total)
    return _passed(grad, x, inside, grid.clip), total.reshape(scale.shape)


def _backward_all(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, grid: _Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the stored scale and the zero point."""
    used, zero = _used(scale, zero_point, x.ndim, grid)
    shifted = torch.round(_clipped(x.float(), grid.clip) / used) + zero
    outside = (shifted < grid.low) | (shifted > grid.high)
    total = -torch.where(outside, grad.float() * used, 0.0).sum_to_size(used.shape)
    passed, for_scale = _backward_scale(grad, x, scale, zero_point, grid)
    return passed, for_scale, total.reshape(zero_point.shape)


class _FakeQuantize(torch.autograd.Function):
    """Saves only its input: the integers are computed again in the backward pass, where they cost nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        axis: int | None,
        forward: _Grid,
        grid: _Grid,
        gradient_factor: float,
        known: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.axis, ctx.grid, ctx.gradient_factor = axis, grid, gradient_factor
        if known is not None:
            return known.view_as(known)
        rows, restore = _rows(x, axis)
        return restore(fused(_forward)(rows, scale, zero_point, forward))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        rows, restore = _rows(x, ctx.axis)
        grad = _rows(_laid_out_like(gradients[0], x), ctx.axis)[0]
        _, for_scale, for_zero_point, *_ = ctx.needs_input_grad
        compute = _backward_all if for_zero_point else _backward_scale if for_scale else _backward_input
        passed, *sums = fused(compute)(grad, rows, scale, zero_point, ctx.grid)
        found = [total * ctx.gradient_factor for total in sums]
        return restore(passed), *found, *(None,) * (7 - len(found))


# Layouts


def _laid_out_like(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient with the strides of the input, so that both flatten in the same order."""
    if torch.compiler.is_compiling():
        return grad
    if x.is_contiguous():
        return grad.contiguous()
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return grad.contiguous(memory_format=torch.channels_last)
    return grad


def _rows(x: Tensor, axis: int | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """View `x` as [elements] or [channels, elements], so that one kernel serves every shape; and the way back.

    In a model that is compiled as a whole `x` stays as it is: there the compiler chooses the layout, and flattening
    would make it copy.
    """
    if torch.compiler.is_compiling():
        return x, lambda rows: rows
    if axis not in (None, 0):
        rows, restore = _rows(x.movedim(axis, 0), 0)
        return rows, lambda rows: restore(rows).movedim(0, axis)
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        moved = x.permute(0, 2, 3, 1)  # the order in memory: flattening copies nothing
        return _flat(moved, axis), lambda rows: rows.view(moved.shape).permute(0, 3, 1, 2)
    return _flat(x, axis), lambda rows: rows.view(x.shape)


def _flat(x: Tensor, axis: int | None) -> Tensor:
    return x.reshape(-1) if axis is None else x.reshape(x.shape[0], -1)
