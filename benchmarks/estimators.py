"""Gradients of rounding other than straight-through, tried against it by qat.py and left out of halfeven.

EWGS (arXiv 2104.00903): a gradient is scaled up or down as the value lies above or below its integer. DSQ (arXiv
1908.05033): the slope of a soft staircase of hyperbolic tangents. Both in units of the scale, forward as ever.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from halfeven.quantization import fake_quantize as fake_quantization

Weigh = Callable[[Tensor, Tensor], Tensor]
"""A gradient and the value in units of the scale -> the gradient that passes."""


def ewgs(strength: float) -> Weigh:
    return lambda grad, ratio: grad * (1 + strength * torch.sign(grad) * (ratio - torch.round(ratio)))


def dsq(alpha: float) -> Weigh:
    """`alpha` in (0, 1): 0 is a staircase; the step between two integers rises by 1 - alpha in the soft one."""
    steepness = math.log(2 / alpha - 1)
    factor = 0.5 * steepness / math.tanh(0.5 * steepness)

    def weigh(grad: Tensor, ratio: Tensor) -> Tensor:
        rise = torch.tanh(steepness * (ratio - torch.floor(ratio) - 0.5))
        return grad * factor * (1 - rise * rise)

    return weigh


@contextmanager
def passed_by(weigh: Weigh | None) -> Iterator[None]:
    """Inside, gradients of what is fake-quantized are weighed by this; None: straight through."""
    if weigh is None:
        yield
        return
    with_input, with_scale = fake_quantization._backward_input, fake_quantization._backward_scale

    def weighed(passed: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Any) -> Tensor:
        used, _ = fake_quantization._used_parameters(scale, zero_point, x.ndim, grid)
        return weigh(passed, x.float() / used)

    def backward_input(grad: Tensor, *rest: Any) -> tuple[Tensor]:
        return (weighed(with_input(grad, *rest)[0], *rest),)

    def backward_scale(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        passed, total = with_scale(grad, *rest)
        return weighed(passed, *rest), total

    with mock.patch.multiple(fake_quantization, _backward_input=backward_input, _backward_scale=backward_scale):
        yield
