"""Pools whose window is the whole input, `avg_pool2d(y, y.shape[2:])`, as means and maxima over the positions.

`torch.export` makes the size of a window a constant, although such a pool works at any size.
"""

from typing import Any

import torch
from torch import SymInt, Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
MAXIMA = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d)
POOLS = frozenset((*AVERAGES, *MAXIMA))
DEFAULTS = {"dilation": 1, "return_indices": False, "divisor_override": None}
"""Arguments under which a pool is a mean or a maximum, where they are given."""


class SizedPools(TorchFunctionMode):
    """Replace pools over windows of the input's own free size, while a model is traced."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in POOLS and (axes := _axes_of_whole_window(*args, **kwargs)):
            pooled = args[0] if args else kwargs["input"]
            return pooled.mean(axes, keepdim=True) if func in AVERAGES else pooled.amax(axes, keepdim=True)
        return func(*args, **kwargs)


def _axes_of_whole_window(
    input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, *more: Any, **others: Any
) -> list[int]:
    """Return the axes of a window that is the whole input, by the symbol of a free size; [] for any other window."""
    if not isinstance(kernel_size, tuple | list) or more:
        return []
    if any(others.get(name, usual) != usual for name, usual in DEFAULTS.items()):
        return []
    axes = list(range(-len(kernel_size), 0))
    # Sizes are compared as texts: of two symbols torch.export would decide whether they are equal, and note a
    # condition.
    free = any(isinstance(size, SymInt) for size in kernel_size)
    same = [str(size) for size in kernel_size] == [str(input.shape[axis]) for axis in axes]
    padded = any(padding) if isinstance(padding, tuple | list) else bool(padding)
    return axes if free and same and not padded else []
