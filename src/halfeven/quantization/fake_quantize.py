"""Differentiable fake-quantization: one fused kernel forward and one backward, with the clip of an activation in both.

The gradients are those of learned step size quantization: LSQ (arXiv 1902.08153) for the input and the scale, LSQ+
(arXiv 2004.09576) for the zero point, which stays an integer of the grid here. The LSQ gradient of the scale is in
`_backward_scale`.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from halfeven.quantization.arithmetic import SMALLEST_EXPONENT, on_grid, per_channel, representable
from halfeven.quantization.compile import fused, fused_once_worthwhile
from halfeven.quantization.scheme import Scheme

Domain = Literal["linear", "log"]
"""Form in which a learned scale is stored: "linear", as itself, of which the absolute value is used; "log", as its
binary logarithm."""

Clip = tuple[float, float]
"""Bounds of an activation function that clips, for example (0, inf) for ReLU."""

UNCLIPPED: Clip = (-math.inf, math.inf)


def effective_scale(stored: Tensor, domain: Domain = "linear", power_of_two: bool = False) -> Tensor:
    """Return the scale in use for a stored one: positive, at least `arithmetic.SMALLEST_SCALE`, snapped to 16 bits.

    In the linear domain the absolute value keeps a learned scale positive without a dead zone: a scale that crosses
    zero is reflected, and so is its gradient. Snapping passes the gradient through, and so does rounding up to a power
    of two, which takes its place with `power_of_two` (TQT, arXiv 1903.08066, section 3.2).
    """
    positive = torch.exp2(stored) if domain == "log" else torch.where(stored < 0, -stored, stored)
    # The compiler builds a power of two integers into the kernel; a floating-point constant of a module would be an
    # argument of the kernel, and each call would make a tensor of it.
    least = 2.0**SMALLEST_EXPONENT
    # The first term is exactly 0 and carries the gradient (straight-through).
    return (positive - positive.detach()) + representable(positive.detach().clamp(min=least), power_of_two)


def stored_scale(scale: Tensor, domain: Domain) -> Tensor:
    """Return the number to store for a positive scale: the inverse of `effective_scale`."""
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
    precomputed: Tensor | None = None,
) -> Tensor:
    """Quantize and dequantize a tensor, with the gradients of learned step size quantization.

    Let x be an element, s its scale and z its zero point. x gets the incoming gradient inside the grid and 0 outside
    (straight-through). s gets the incoming gradient times `round(x/s) - x/s` inside the grid and times `bound - z`
    outside. A learned z gets 0 inside and the incoming gradient times `-s` outside. The gradients of s and z are summed
    over the elements that share them and multiplied by `gradient_factor`.

    Args:
        x: any shape, floating.
        scale: [] or [channels], float32: positive, or stored as `domain` says.
        zero_point: like `scale`; integers, or a learned zero point in float32, which is rounded and clamped to the
            grid.
        scheme: grid and axis.
        gradient_factor: LSQ's gradient scale, 1 / sqrt(elements * quant_max) (LSQ, section 2.2).
        domain: how a learned scale is stored; None: `scale` is the scale in use.
        clip: bounds that x is clipped to before it is quantized, in the same kernel.
        rounding_gradient: True: inside the grid the scale gets the gradient of rounding (LSQ); False: it gets 0 there,
            the gradient of clipping alone (PACT, arXiv 1805.06085, section 3).
        precomputed: the result, where an earlier call has computed it; then only the backward pass computes.
    """
    # A kernel sees [elements] or [channels, elements], except in a model that is compiled as a whole.
    axis = scheme.axis if scheme.axis is None or torch.compiler.is_compiling() else 0
    pair = scheme.quant_min, scheme.quant_max
    settings = _Kernel(*pair, axis, domain, clip, rounding_gradient, scheme.power_of_two)
    # An unsigned symmetric grid starts at 0: it is the lower bound of a ReLU already.
    ends_at_zero = scheme.symmetric and not scheme.signed and clip[0] == 0
    # The backward pass keeps the bound: a negative number that rounds to 0 lies inside of the grid, and the ReLU passes
    # it no gradient.
    forward = settings._replace(clip=(-math.inf, clip[1])) if ends_at_zero else settings
    result = _FakeQuantize.apply(x, scale, zero_point, scheme.axis, forward, settings, gradient_factor, precomputed)
    assert isinstance(result, Tensor)
    return result


class _Kernel(NamedTuple):
    """The settings of a kernel. It is compiled for all of them except the integers, which are its arguments."""

    low: int
    high: int
    axis: int | None
    """Axis of the channels in the tensor as the kernel sees it; None: one scale."""
    domain: Domain | None
    clip: Clip
    rounding: bool
    power_of_two: bool = False


def _used_parameters(scale: Tensor, zero_point: Tensor, ndim: int, settings: _Kernel) -> tuple[Tensor, Tensor]:
    """Return scale and zero point in use, float32, in shapes that broadcast over a tensor with `ndim` axes."""
    if settings.domain is not None:
        scale = effective_scale(scale, settings.domain, settings.power_of_two)
    if zero_point.is_floating_point():
        # LSQ+ learns a real offset. Integer runtimes need an integer of the grid, so it is rounded, straight-through.
        zero_point = on_grid(zero_point, settings.low, settings.high, settings.power_of_two)
    return per_channel(scale, settings.axis, ndim), per_channel(zero_point.float(), settings.axis, ndim)


def _clipped(x: Tensor, clip: Clip) -> Tensor:
    """Clamp by two selections, of which the compiler makes faster code; NaN stays NaN."""
    low, high = clip
    x = torch.where(x < low, low, x) if low > -math.inf else x
    return torch.where(x > high, high, x) if high < math.inf else x


def _quantize_forward(x: Tensor, scale: Tensor, zero_point: Tensor, settings: _Kernel) -> Tensor:
    # LSQ, equations 1 and 2, with a zero point: q = clamp(round(x / s) + z, low, high); result = (q - z) * s.
    used, zero = _used_parameters(scale, zero_point, x.ndim, settings)
    integers = torch.clamp(torch.round(_clipped(x.float(), settings.clip) / used) + zero, settings.low, settings.high)
    return ((integers - zero) * used).to(x.dtype)


def _passed_gradient(grad: Tensor, x: Tensor, inside: Tensor, clip: Clip) -> Tensor:
    """Return the gradient of the input: the incoming one inside of grid and clip, else 0 (LSQ, equation 5)."""
    low, high = clip
    # The clip lies in the same kernel, so its derivative is here too; a ReLU passes nothing at 0, as in torch.
    inside = inside & (x > low) if low > -math.inf else inside
    inside = inside & (x < high) if high < math.inf else inside
    return torch.where(inside, grad, 0.0)


def _backward_input(grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, settings: _Kernel) -> tuple[Tensor]:
    """Return the gradient of the input alone."""
    used, zero = _used_parameters(scale, zero_point, x.ndim, settings)
    # The mask is taken from the rounded integer: a value just beyond the range that still rounds to the last integer
    # passes its gradient.
    shifted = torch.round(x.float() / used) + zero
    return (_passed_gradient(grad, x, (shifted >= settings.low) & (shifted <= settings.high), settings.clip),)


def _backward_scale(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, settings: _Kernel
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the input and of the stored scale, which sums over the elements that share it."""
    used, zero = _used_parameters(scale, zero_point, x.ndim, settings)
    ratio = _clipped(x.float(), settings.clip) / used
    shifted = torch.round(ratio) + zero
    inside = (shifted >= settings.low) & (shifted <= settings.high)
    # With a zero point z, the bounds of LSQ's equation 3 become low - z and high - z.
    clipped = torch.clamp(shifted, settings.low, settings.high) - zero
    # LSQ, equation 3: d(result) / ds = round(x / s) - x / s inside the grid, and its lower or upper bound outside.
    # PACT (section 3) has 0 inside.
    slope = torch.where(inside, shifted - zero - ratio if settings.rounding else 0.0, clipped)
    # Summed in float32 under autocast too: the terms have both signs and nearly cancel.
    total = (grad.float() * slope).sum_to_size(used.shape)
    if settings.domain == "log":
        # s = 2^stored, so ds / d(stored) = s * ln 2 (TQT, arXiv 1903.08066, learns the logarithm too).
        total = total * (used * math.log(2))
    elif settings.domain == "linear":
        # s = |stored|, so ds / d(stored) is the sign of the stored scale.
        total = torch.where(per_channel(scale, settings.axis, x.ndim) < 0, -total, total)
    return _passed_gradient(grad, x, inside, settings.clip), total.reshape(scale.shape)


def _backward_all(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, settings: _Kernel
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the input, of the stored scale and of the zero point."""
    used, zero = _used_parameters(scale, zero_point, x.ndim, settings)
    shifted = torch.round(_clipped(x.float(), settings.clip) / used) + zero
    outside = (shifted < settings.low) | (shifted > settings.high)
    # LSQ+, section 3.1: its offset is beta = -s * z, so d(result) / dz is 0 inside the grid and -s outside.
    total = -torch.where(outside, grad.float() * used, 0.0).sum_to_size(used.shape)
    passed, for_scale = _backward_scale(grad, x, scale, zero_point, settings)
    return passed, for_scale, total.reshape(zero_point.shape)


class _FakeQuantize(torch.autograd.Function):
    """Saves its inputs alone: the backward pass computes the integers again, which a fused kernel does for free."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        axis: int | None,
        forward: _Kernel,
        settings: _Kernel,
        gradient_factor: float,
        precomputed: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.axis = axis
        ctx.settings = settings
        ctx.gradient_factor = gradient_factor
        if precomputed is not None:
            # A view, so that autograd attaches this function to the result and not to the cached tensor.
            return precomputed.view_as(precomputed)
        rows, restore = _view_as_rows(x, axis)
        # Gradients are off in here, in training too, so the first forward pass of a process may run unfused; its
        # backward pass builds kernels.
        return restore(fused_once_worthwhile(_quantize_forward, x)(rows, scale, zero_point, forward))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        rows, restore = _view_as_rows(x, ctx.axis)
        # The gradient may come in another memory format than x (channels last or not), and rows must pair the same
        # elements.
        grad = _view_as_rows(_laid_out_like(gradients[0], x), ctx.axis)[0]
        _, for_scale, for_zero_point, *_ = ctx.needs_input_grad
        # The smallest kernel that yields what is needed: an observed range needs no sums.
        compute = _backward_all if for_zero_point else _backward_scale if for_scale else _backward_input
        passed, *sums = fused(compute)(grad, rows, scale, zero_point, ctx.settings)
        # LSQ, section 2.2: the gradient scale g. Outside of the kernel, into which a number that differs for each
        # quantizer would be compiled.
        found = [total * ctx.gradient_factor for total in sums]
        # `forward` has eight arguments: a gradient for x and, where they were computed, for scale and zero point; None
        # for the rest.
        return restore(passed), *found, *(None,) * (7 - len(found))


# Layouts


def _laid_out_like(grad: Tensor, x: Tensor) -> Tensor:
    """Return the gradient in the memory layout of the input, so that both flatten in the same order."""
    if torch.compiler.is_compiling():
        return grad
    if x.is_contiguous():
        return grad.contiguous()
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return grad.contiguous(memory_format=torch.channels_last)
    return grad


def _view_as_rows(x: Tensor, axis: int | None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """View `x` as [elements] or [channels, elements], so that one kernel serves every shape.

    In a model that is compiled as a whole `x` stays as it is: there the compiler chooses the layout, and flattening
    would make it copy.

    Returns:
        The view, and a function that brings a tensor of the view's shape back to the shape of `x`.
    """
    if torch.compiler.is_compiling():
        return x, lambda rows: rows
    # The output channels of a transposed convolution's weight lie on axis 1.
    if axis not in (None, 0):
        rows, restore = _view_as_rows(x.movedim(axis, 0), 0)
        return rows, lambda rows: restore(rows).movedim(0, axis)
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        moved = x.permute(0, 2, 3, 1)  # the order in memory: flattening copies nothing
        return _flattened(moved, axis), lambda rows: rows.view(moved.shape).permute(0, 3, 1, 2)
    return _flattened(x, axis), lambda rows: rows.view(x.shape)


def _flattened(x: Tensor, axis: int | None) -> Tensor:
    return x.reshape(-1) if axis is None else x.reshape(x.shape[0], -1)
