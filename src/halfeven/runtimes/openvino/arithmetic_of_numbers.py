"""Arithmetic of integers with a number, behind which they are integers on another scale, or with another zero.

OpenVINO's CPU plugin keeps the bytes, and moves scale and zero into the operators behind: a clip stops at whole bytes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from halfeven.runtimes.openvino.exact_values import Average, Codes, Scaled

aten = torch.ops.aten


def is_number(x: Any) -> bool:
    """Return True for a number, as opposed to a tensor."""
    return isinstance(x, int | float)


def times_number(x: Any, factor: Tensor, product: Callable[[], Tensor]) -> Scaled | Average | None:
    """Return integers, or an average of them over a window, times a number; None for all else.

    Args:
        x: the integers.
        factor: the number.
        product: computes the real values of the product.
    """
    if isinstance(x, Average):
        return x.times(factor) if x.of_window else None
    scaled = _as_scaled(x)
    return None if scaled is None else scaled.times(factor, product())


def plus_number(node: fx.Node, args: tuple[Any, Any], result: Callable[[], Tensor]) -> Scaled | Average | None:
    """Return integers, or an average over a window, plus a number, minus it, or subtracted from it; else None.

    Args:
        node: of the operator.
        args: its operands, a tensor and a number.
        result: computes the real values of its result.
    """
    first, second = args
    x, number = (second, first) if is_number(first) else (first, second)
    if not is_number(number):
        return None
    if node.target is aten.add.Tensor:
        return _plus(x, number, result)
    if node.target is aten.sub.Tensor and is_number(second):
        return _plus(x, -number, result)
    return _plus(times_number(x, torch.tensor(-1.0), result), number, result)


def _plus(x: Any, number: float, total: Callable[[], Tensor]) -> Scaled | Average | None:
    if isinstance(x, Average):
        return x.plus(number) if x.of_window else None
    scaled = _as_scaled(x)
    return None if scaled is None else scaled.plus(number, total())


def _as_scaled(x: Any) -> Scaled | None:
    if isinstance(x, Codes):
        return x.scaled
    return x if isinstance(x, Scaled) else None
