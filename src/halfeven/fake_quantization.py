"""Fake-quantization, differentiable, in one fused pass forward and one backward, with a clip fused into it.

Gradients are those of learned step size quantization: LSQ (arXiv 1902.08153) for the scale, LSQ+ (arXiv 2004.09576) for
the zero point, which stays an integer of the grid here.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from halfeven.arithmetic import SMALLEST_SCALE, snap
from halfeven.compilation import fused
from halfeven.scheme import Scheme

Domain = Literal["linear", "log"]
"""How a learned scale is stored: as itself, used by its absolute value, or as its binary logarithm."""

Clip = tuple[float, float]
"""The bounds of an activation that clips, such as (0, inf) of ReLU, before it is quantized."""

UNCLIPPED: Clip = (-math.inf, math.inf)


def effective_scale(stored: Tensor, domain: Domain = "linear") -> Tensor:
    """The scale that is used for a stored one: positive, at least `SMALLEST_SCALE`, snapped to 16 bits.

    In the linear domain the absolute value keeps a learned scale positive without a dead zone: one that crosses zero is
    reflected, and its gradient with it. Snapping passes the gradient through.
    """
    positive = torch.exp2(stored) if domain == "log" else torch.where(stored < 0, -stored, stored)
    # The first summand carries the gradient and is exactly 0.
    return (positive - positive.detach()) + snap(positive.detach().clamp(min=SMALLEST_SCALE))


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
    result = _FakeQuantize.apply(x, scale, zero_point, scheme, gradient_factor, domain, clip, rounding_gradient, known)
    assert isinstance(result, Tensor)
    return result


def _used(scale: Tensor, zero_point: Tensor, low: int, high: int, domain: Domain | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point in use, in float32."""
    if domain is not None:
        scale = effective_scale(scale, domain)
    if zero_point.is_floating_point():
        zero_point = torch.clamp(torch.round(zero_point), low, high)
    return scale, zero_point.float()


def _clipped(x: Tensor, clip: Clip) -> Tensor:
    """A clamp as two selections, which the compiler makes faster code of; NaN stays NaN."""
    low, high = clip
    x = torch.where(x < low, low, x) if low > -math.inf else x
    return torch.where(x > high, high, x) if high < math.inf else x


def _forward(
    x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, domain: Domain | None, clip: Clip
) -> Tensor:
    scale, zero = _used(scale, zero_point, low, high, domain)
    integers = torch.clamp(torch.round(_clipped(x.float(), clip) / scale) + zero, low, high)
    return ((integers - zero) * scale).to(x.dtype)


def _passed(grad: Tensor, x: Tensor, inside: Tensor, clip: Clip) -> Tensor:
    """The gradient where it goes through: inside the grid, and inside the clip."""
    low, high = clip
    inside = inside & (x > low) if low > -math.inf else inside
    inside = inside & (x < high) if high < math.inf else inside
    return torch.where(inside, grad, 0.0)


def _backward_input(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int, domain: Domain | None, clip: Clip
) -> Tensor:
    scale, zero = _used(scale, zero_point, low, high, domain)
    shifted = torch.round(x.float() / scale) + zero
    return _passed(grad, x, (shifted >= low) & (shifted <= high), clip)


def _backward_scale(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    domain: Domain | None,
    clip: Clip,
    rounding: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the stored scale; the latter summed over the axes that share it."""
    used, zero = _used(scale, zero_point, low, high, domain)
    ratio = _clipped(x.float(), clip) / used
    shifted = torch.round(ratio) + zero
    inside = (shifted >= low) & (shifted <= high)
    slope = torch.where(inside, shifted - zero - ratio if rounding else 0.0, torch.clamp(shifted, low, high) - zero)
    total = (grad.float() * slope).sum_to_size(scale.shape)
    if domain == "log":
        total = total * (used * math.log(2))
    elif domain == "linear":
        total = torch.where(scale < 0, -total, total)
    return _passed(grad, x, inside, clip), total


def _backward_all(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    low: int,
    high: int,
    domain: Domain | None,
    clip: Clip,
    rounding: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, the stored scale and the zero point."""
    used, zero = _used(scale, zero_point, low, high, domain)
    shifted = torch.round(_clipped(x.float(), clip) / used) + zero
    outside = (shifted < low) | (shifted > high)
    total = -torch.where(outside, grad.float() * used, 0.0).sum_to_size(scale.shape)
    return *_backward_scale(grad, x, scale, zero_point, low, high, domain, clip, rounding), total


class _FakeQuantize(torch.autograd.Function):
    """Saves only its input: the integers are computed again in the backward pass, where they cost nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        scheme: Scheme,
        gradient_factor: float,
        domain: Domain | None,
        clip: Clip,
        rounding_gradient: bool,
        known: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.scheme, ctx.gradient_factor, ctx.domain, ctx.clip = scheme, gradient_factor, domain, clip
        ctx.rounding_gradient = rounding_gradient
        if known is not None:
            return known.view_as(known)
        if scheme.symmetric and not scheme.signed and clip[0] == 0:
            clip = (-math.inf, clip[1])  # the grid ends there
        rows, restore, shape = _rows(x, scheme.axis)
        grid = (scale.reshape(shape), zero_point.reshape(shape), scheme.quant_min, scheme.quant_max)
        return restore(fused(_forward)(rows, *grid, domain, clip))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        scheme: Scheme = ctx.scheme
        rows, restore, shape = _rows(x, scheme.axis)
        grad = _rows(_laid_out_like(gradients[0], x), scheme.axis)[0]
        grid = (scale.reshape(shape), zero_point.reshape(shape), scheme.quant_min, scheme.quant_max)
        _, for_scale, for_zero_point, *_ = ctx.needs_input_grad
        if not (for_scale or for_zero_point):
            passed, *sums = (fused(_backward_input)(grad, rows, *grid, ctx.domain, ctx.clip),)
        else:
            compute = _backward_all if for_zero_point else _backward_scale
            passed, *sums = fused(compute)(grad, rows, *grid, ctx.domain, ctx.clip, ctx.rounding_gradient)
        found = [total.reshape(scale.shape) * ctx.gradient_factor for total in sums]
        return restore(passed), *found, *(None,) * (8 - len(found))


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


def _rows(x: Tensor, axis: int | None) -> tuple[Tensor, Callable[[Tensor], Tensor], list[int]]:
    """View `x` as [elements] or [channels, elements], so that one kernel serves every shape; the way back, and the
    shape of a scale that broadcasts over the view.

    In a model that is compiled as a whole `x` stays as it is: there the compiler chooses the layout, and flattening
    would make it copy.
    """
    if torch.compiler.is_compiling():
        return x, lambda rows: rows, [] if axis is None else [-1 if i == axis % x.ndim else 1 for i in range(x.ndim)]
    if axis is not None:
        moved = x.movedim(axis, 0)
        shape = moved.shape
        return moved.reshape(shape[0], -1), lambda rows: rows.reshape(shape).movedim(0, axis), [-1, 1]
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        moved = x.permute(0, 2, 3, 1)  # the order in memory: flattening copies nothing
        return moved.reshape(-1), lambda rows: rows.reshape(moved.shape).permute(0, 3, 1, 2), []
    return x.reshape(-1), lambda rows: rows.reshape(x.shape), []
