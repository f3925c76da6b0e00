"""Learned rounding: gradient descent decides for each weight whether it is rounded up or down (AdaRound).

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", section 3.2 (arXiv:2004.10568); white
paper, section 3.4 (arXiv:2106.08295). A weight W with scale s becomes the soft weight
W~ = s * clamp(floor(W / s) + h(V), quant_min, quant_max) with the rectified sigmoid
h(V) = clamp(1.2 * sigmoid(V) - 0.1, 0, 1), which a regularizer drives to 0 or 1 while V is learned.

One step of a weight (gradient of the loss and of the regularizer, Adam, the new soft weight) is one pass over its
elements, fused by torch.compile; with autograd and an optimizer it would be about forty.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfeven.quantization.compile import fused
from halfeven.quantization.scheme import Scheme

STRETCH = 1.2
"""zeta - gamma of the paper: the sigmoid is stretched to [-0.1, 1.1], so that it reaches 0 and 1."""
SHIFT = -0.1
"""gamma of the paper."""
FIRST_SHARPNESS = 20.0
"""beta of the regularizer when it sets in."""
LAST_SHARPNESS = 2.0
"""beta of the regularizer at the last step."""
ADAM_BETA1 = 0.9
ADAM_BETA2 = 0.999
ADAM_EPSILON = 1e-8


def soft_step(v: Tensor) -> Tensor:
    """Return the rectified sigmoid h(V), in [0, 1] (equation 23)."""
    return torch.clamp(STRETCH * torch.sigmoid(v) + SHIFT, 0.0, 1.0)


def inverse_soft_step(step: Tensor) -> Tensor:
    """Return the V with h(V) = step, for a step in [0, 1): soft weights start as the float weights."""
    # No clamp is undone: a step in [0, 1) lies inside of the stretched sigmoid.
    return torch.logit((step - SHIFT) / STRETCH)


def regularizer_sharpness(progress: float) -> float:
    """Return beta after a fraction in [0, 1] of the regularizer's steps: from 20 to 2 along a cosine."""
    # AdaRound, section 3.2: with a high beta the term is flat except next to 0 and 1, so that the error decides; a low
    # beta then pulls what is left to 0 or 1.
    return LAST_SHARPNESS + 0.5 * (FIRST_SHARPNESS - LAST_SHARPNESS) * (1 + math.cos(math.pi * progress))


def regularizer(v: Tensor, beta: float) -> Tensor:
    """Return 1 - |2 h(V) - 1|^beta, shaped like V (equation 24): 0 where h(V) is 0 or 1, at most 1 elsewhere."""
    return 1 - (2 * soft_step(v) - 1).abs().pow(beta)


def soft_weight(v: Tensor, floor: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """Return W~, [rows, elements], of V and floor(W / s), [rows, elements], and s, [rows, 1]."""
    return scale * torch.clamp(floor + soft_step(v), low, high)


def _adam_step(
    v: Tensor,
    first: Tensor,
    second: Tensor,
    soft: Tensor,
    grad: Tensor,
    floor: Tensor,
    scale: Tensor,
    numbers: Tensor,
    grid: tuple[int, int],
    regularized: bool,
) -> None:
    """Take one step of Adam on V, in place in `v`, `first`, `second` and `soft`; all [rows, elements].

    Args:
        v: V.
        first, second: Adam's moments.
        soft: the soft weight W~.
        grad: gradient of the loss with respect to the soft weight.
        floor: floor(W / s).
        scale: s, [rows, 1].
        numbers: learning rate, weight of the regularizer, beta, and Adam's two bias corrections, [5]: a tensor, so that
            none of the values is compiled in.
        grid: quant_min and quant_max.
        regularized: add the gradient of the regularizer.
    """
    rate, weight, beta, correction1, correction2 = numbers.unbind()
    # Chain rule through W~ = s * clamp(floor + h(V)): h'(V) is the slope, and 0 where h or the clamp saturates.
    sigmoid = torch.sigmoid(v)
    stretched = STRETCH * sigmoid + SHIFT
    step = torch.clamp(stretched, 0.0, 1.0)
    slope = torch.where((stretched > 0) & (stretched < 1), STRETCH * sigmoid * (1 - sigmoid), 0.0)
    level = floor + step
    total = torch.where((level >= grid[0]) & (level <= grid[1]), grad * scale, 0.0)
    if regularized:
        # d/dh (1 - |2h - 1|^beta) = -2 beta sign(2h - 1) |2h - 1|^(beta - 1)
        decided = 2 * step - 1
        # At h = 1/2 the sign is 0, and with it the whole term: the clamp only keeps the logarithm finite.
        power = torch.exp((beta - 1) * torch.log(decided.abs().clamp(min=1e-12)))
        total = total - 2 * weight * beta * torch.sign(decided) * power
    total = total * slope
    # Adam (arXiv:1412.6980, algorithm 1)
    mean = torch.lerp(first, total, 1 - ADAM_BETA1)
    square = torch.lerp(second, total * total, 1 - ADAM_BETA2)
    new = v - rate * (mean / correction1) / (torch.sqrt(square / correction2) + ADAM_EPSILON)
    first.copy_(mean)
    second.copy_(square)
    v.copy_(new)
    soft.copy_(soft_weight(new, floor, scale, *grid))


@dataclass
class Rounding:
    """The rounding of one weight while it is learned."""

    scheme: Scheme
    scale: Tensor
    """s, [rows, 1]: a row for each channel, or one for all."""
    floor: Tensor
    """floor(W / s), [rows, elements], int8; values beyond the grid are moved to the first integer beyond it."""
    v: Tensor
    """V, [rows, elements]."""
    first: Tensor
    """Adam's first moment, [rows, elements]."""
    second: Tensor
    """Adam's second moment, [rows, elements]."""
    rows: Tensor
    """The soft weight, [rows, elements]."""
    soft: Tensor
    """The same numbers in the weight's shape: the leaf that collects the gradient."""
    steps: int = 0
    """Steps taken."""

    @staticmethod
    def of(weight: Tensor, scale: Tensor, scheme: Scheme) -> "Rounding":
        """Return the rounding whose soft weight is the float weight: h(V) is the fractional part of W / s.

        Args:
            weight: W, any shape, float32.
            scale: s, [] or [channels].
            scheme: the weight's grid and channel axis.
        """
        low = scheme.quant_min
        high = scheme.quant_max
        column = scale.detach().reshape(-1, 1).clone()
        ratio = _as_rows(weight.detach(), scheme.axis) / column  # [rows, elements]
        floor = torch.floor(ratio)
        # The fractional part. float32 rounds that of a tiny negative quotient to 1, where h has no slope.
        v = inverse_soft_step((ratio - floor).clamp(0.0, 1 - 1e-6))
        # Clamped to one below the grid, from where h(V) cannot bring a clipped weight back inside. Grids of weights are
        # narrow, so that low - 1 is at least -128 and fits in int8.
        floor = floor.clamp(low - 1, high).to(torch.int8)
        # `soft` is a view of `rows`, in another shape: the fused step writes the rows, and the layer reads the new
        # weight.
        rows = soft_weight(v, floor, column, low, high)
        soft = _from_rows(rows, weight.shape, scheme.axis).detach().requires_grad_()
        return Rounding(scheme, column, floor, v, torch.zeros_like(v), torch.zeros_like(v), rows, soft)

    def step(self, rate: float, weight: float, beta: float) -> None:
        """Take one step along the gradient that the soft weight has collected.

        Args:
            rate: learning rate of Adam.
            weight: factor of the regularizer's sum over all elements; 0: no regularizer.
            beta: sharpness of the regularizer.
        """
        self.steps += 1
        corrections = (1 - ADAM_BETA1**self.steps, 1 - ADAM_BETA2**self.steps)
        numbers = torch.tensor([rate, weight, beta, *corrections], device=self.v.device)
        assert self.soft.grad is not None
        # The kernel sees [rows, elements] of any layer, so that it is compiled once for all of them.
        grad = _as_rows(self.soft.grad, self.scheme.axis)
        state = (self.v, self.first, self.second, self.rows, grad, self.floor, self.scale.detach(), numbers)
        with torch.no_grad():
            fused(_adam_step)(*state, (self.scheme.quant_min, self.scheme.quant_max), weight > 0)
        # The leaf is in no optimizer, whose zero_grad would clear it, and gradients add up.
        self.soft.grad = None

    def set_scale_gradient(self) -> None:
        """Set the gradient of a learned scale: that of the soft weight times W~ / s, summed over a row.

        Jeon et al., "Genie: Show Me the Data for Quantization" (arXiv:2212.04780).
        """
        if self.scale.requires_grad and self.soft.grad is not None:
            grad = _as_rows(self.soft.grad, self.scheme.axis)
            self.scale.grad = (grad * self.rows / self.scale.detach()).sum(1, keepdim=True)

    @property
    def integers(self) -> Tensor:
        """The decided integers, in the weight's shape."""
        # h(V) >= 1/2 is V >= 0, since 1.2 * sigmoid(0) - 0.1 = 1/2.
        hard = torch.clamp(self.floor + (self.v >= 0), self.scheme.quant_min, self.scheme.quant_max)
        return _from_rows(hard, self.soft.shape, self.scheme.axis)

    @property
    def undecided(self) -> float:
        """Fraction of the elements with h(V) strictly between 0 and 1."""
        step = soft_step(self.v)
        return float(((step > 0) & (step < 1)).float().mean())


def _as_rows(x: Tensor, axis: int | None) -> Tensor:
    return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)


def _from_rows(rows: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    if axis is None:
        return rows.reshape(shape)
    # The shape that `_as_rows` has flattened: the channels first, then the other axes in their order.
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return rows.reshape(moved).movedim(0, axis)
