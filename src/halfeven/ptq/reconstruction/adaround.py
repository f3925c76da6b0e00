"""Learned rounding: whether a weight is rounded up or down is found by gradient descent (AdaRound).

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (arXiv 2004.10568); white paper, section
3.4. A weight W with scale s becomes W~ = s * clamp(floor(W / s) + h(V), low, high) with the rectified sigmoid
h(V) = clamp(1.2 * sigmoid(V) - 0.1, 0, 1), which a regularizer drives to 0 or 1 while it is learned.

All that happens to a weight in one step (gradient of the loss and of the regularizer, Adam, the new soft weight) is one
pass over it, fused by torch.compile; written with autograd and an optimizer it is some forty.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfeven.quantization.compile import fused
from halfeven.quantization.scheme import Scheme

STRETCH, SHIFT = 1.2, -0.1
"""zeta - gamma and gamma of the paper: the sigmoid, stretched to [-0.1, 1.1], so that it reaches 0 and 1."""
FIRST_SHARPNESS, LAST_SHARPNESS = 20.0, 2.0
"""beta of the regularizer at the start and at the end of its time."""
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


def soft_step(v: Tensor) -> Tensor:
    """The rectified sigmoid h(V), in [0, 1]."""
    return torch.clamp(STRETCH * torch.sigmoid(v) + SHIFT, 0.0, 1.0)


def inverse_soft_step(step: Tensor) -> Tensor:
    """The V with h(V) = step, for a step in [0, 1): soft weights start where the float ones are."""
    return torch.logit((step - SHIFT) / STRETCH)


def sharpness(progress: float) -> float:
    """beta at a share of the regularizer's time in [0, 1]: from 20 to 2 by a cosine."""
    return LAST_SHARPNESS + 0.5 * (FIRST_SHARPNESS - LAST_SHARPNESS) * (1 + math.cos(math.pi * progress))


def regularizer(v: Tensor, beta: float) -> Tensor:
    """1 - |2 h(V) - 1|^beta, shaped like V: 1 where the rounding is undecided, 0 where it is 0 or 1."""
    return 1 - (2 * soft_step(v) - 1).abs().pow(beta)


def soft_weight(v: Tensor, floor: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """W~, from V and floor(W / s), [rows, elements], and s, [rows, 1]."""
    return scale * torch.clamp(floor + soft_step(v), low, high)


def _advance(
    v: Tensor,
    first: Tensor,
    second: Tensor,
    soft: Tensor,
    grad: Tensor,
    floor: Tensor,
    scale: Tensor,
    numbers: Tensor,
    grid: tuple[int, int],
    pushed: bool,
) -> None:
    """One step of Adam on V, in place in `v`, `first`, `second` and `soft`; all [rows, elements].

    Args:
        grad: gradient of the loss with respect to the soft weight.
        numbers: rate, weight of the regularizer, beta, and Adam's two corrections: a tensor, so that no value of them
            is compiled in.
        pushed: whether the regularizer takes part.
    """
    rate, weight, beta, correction1, correction2 = numbers.unbind()
    sigmoid = torch.sigmoid(v)
    stretched = STRETCH * sigmoid + SHIFT
    step = torch.clamp(stretched, 0.0, 1.0)
    slope = torch.where((stretched > 0) & (stretched < 1), STRETCH * sigmoid * (1 - sigmoid), 0.0)
    level = floor + step
    total = torch.where((level >= grid[0]) & (level <= grid[1]), grad * scale, 0.0)
    if pushed:
        decided = 2 * step - 1
        power = torch.exp((beta - 1) * torch.log(decided.abs().clamp(min=1e-12)))
        total = total - 2 * weight * beta * torch.sign(decided) * power
    total = total * slope
    mean = torch.lerp(first, total, 1 - BETA1)
    square = torch.lerp(second, total * total, 1 - BETA2)
    new = v - rate * (mean / correction1) / (torch.sqrt(square / correction2) + EPSILON)
    first.copy_(mean)
    second.copy_(square)
    v.copy_(new)
    soft.copy_(soft_weight(new, floor, scale, *grid))


@dataclass
class Rounding:
    """The rounding of one weight while it is learned."""

    scheme: Scheme
    scale: Tensor
    """[rows, 1]."""
    floor: Tensor
    """floor(W / s), [rows, elements], int8; what lies beyond the grid is kept just beyond it."""
    v: Tensor
    first: Tensor
    second: Tensor
    rows: Tensor
    """The soft weight, [rows, elements]."""
    soft: Tensor
    """The same numbers shaped like the weight: a leaf that gradients come to."""
    steps: int = 0

    @staticmethod
    def of(weight: Tensor, scale: Tensor, scheme: Scheme) -> "Rounding":
        """Start at the float weight: h(V) is the fraction of W / s.

        Args:
            weight: any shape, float32.
            scale: [] or [channels].
        """
        low, high = scheme.quant_min, scheme.quant_max
        column = scale.detach().reshape(-1, 1).clone()
        ratio = _rows(weight.detach(), scheme.axis) / column
        floor = torch.floor(ratio)
        v = inverse_soft_step((ratio - floor).clamp(0.0, 1 - 1e-6))
        floor = floor.clamp(low - 1, high).to(torch.int8)
        rows = soft_weight(v, floor, column, low, high)
        soft = _shaped(rows, weight.shape, scheme.axis).detach().requires_grad_()
        return Rounding(scheme, column, floor, v, torch.zeros_like(v), torch.zeros_like(v), rows, soft)

    def step(self, rate: float, weight: float, beta: float) -> None:
        """Move the rounding by the gradient that has come to the soft weight.

        Args:
            rate: learning rate of Adam.
            weight: factor of the regularizer, which is summed over all elements.
            beta: its sharpness.
        """
        self.steps += 1
        corrections = (1 - BETA1**self.steps, 1 - BETA2**self.steps)
        numbers = torch.tensor([rate, weight, beta, *corrections], device=self.v.device)
        assert self.soft.grad is not None
        grad = _rows(self.soft.grad, self.scheme.axis)
        state = (self.v, self.first, self.second, self.rows, grad, self.floor, self.scale.detach(), numbers)
        with torch.no_grad():
            fused(_advance)(*state, (self.scheme.quant_min, self.scheme.quant_max), weight > 0)
        self.soft.grad = None

    def scale_gradient(self) -> None:
        """Give the scale its gradient, where it is learned: that of the soft weight times its integers (Genie)."""
        if self.scale.requires_grad and self.soft.grad is not None:
            grad = _rows(self.soft.grad, self.scheme.axis)
            self.scale.grad = (grad * self.rows / self.scale.detach()).sum(1, keepdim=True)

    @property
    def integers(self) -> Tensor:
        """The decided integers, shaped like the weight."""
        hard = torch.clamp(self.floor + (self.v >= 0), self.scheme.quant_min, self.scheme.quant_max)
        return _shaped(hard, self.soft.shape, self.scheme.axis)

    @property
    def undecided(self) -> float:
        """Share of the elements whose h(V) is neither 0 nor 1."""
        step = soft_step(self.v)
        return float(((step > 0) & (step < 1)).float().mean())


def _rows(x: Tensor, axis: int | None) -> Tensor:
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def _shaped(rows: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    if axis is None:
        return rows.reshape(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return rows.reshape(moved).movedim(0, axis)
