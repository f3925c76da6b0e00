"""A call's inputs at other sizes of their free axes: a captured model must equal the original there, too."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfeven.errors import CaptureError
from halfeven.graph.batches import Inputs
from halfeven.graph.constant_inputs import is_same_constant
from halfeven.graph.dynamic_shapes import FreeAxes, batch_axes
from halfeven.graph.model_inputs import BATCH
from halfeven.graph.torch_private import pytree


@dataclass(frozen=True)
class OtherSize:
    """A call's inputs with one named axis at another size than the example's."""

    axis_name: str
    size: int
    inputs: Inputs


def other_sizes(inputs: Inputs, free: FreeAxes) -> Iterator[OtherSize]:
    """Yield the inputs at other sizes, axis by axis.

    The original may not take all of them: strides and windows want multiples, tables of positions have an end. Half the
    size comes before twice the size, because an index beyond the end of a table stops a GPU for good.
    """
    # The batch works at any size or at none, so one more sample shows it.
    for label in dict.fromkeys(label for axes in free for label in axes.values()):
        for change in (_one_more,) if label == BATCH else (_half, _twice, _one_more):
            other = _resize_axis(inputs, free, label, change)
            if other is not None:
                yield other


def _resize_axis(
    inputs: Inputs, free: FreeAxes, label: str, change: Callable[[Tensor, int], Tensor]
) -> OtherSize | None:
    leaves, form = pytree.tree_flatten(inputs)
    places = [(place, axis) for place, axes in enumerate(free) for axis, name in axes.items() if name == label]
    before = leaves[places[0][0]].shape[places[0][1]]
    for place, axis in places:
        leaves[place] = change(leaves[place], axis)
    size = leaves[places[0][0]].shape[places[0][1]]
    return OtherSize(label, size, pytree.tree_unflatten(leaves, form)) if size != before else None


def _one_more(x: Tensor, axis: int) -> Tensor:
    return torch.cat([x, x.narrow(axis, 0, 1)], axis)


def _twice(x: Tensor, axis: int) -> Tensor:
    return torch.cat([x, x], axis)


def _half(x: Tensor, axis: int) -> Tensor:
    # At least 2 where the axis has as many: 0 and 1 are special cases for torch.export.
    return x.narrow(axis, 0, max(min(2, x.shape[axis]), x.shape[axis] // 2))


Recorded = Mapping[str, Sequence[Inputs]]
"""The inputs of each submodule's calls, by its name."""


def inner_free_axes(
    record: Callable[[Any, Any], Recorded], recorded: Recorded, inputs: Inputs, free: FreeAxes
) -> dict[str, FreeAxes]:
    """Return the free axes of the inputs of each submodule.

    An axis is free if its size changes with the model's inputs, or differs between the submodule's calls (a head that
    several levels share). A submodule whose calls differ in more than sizes, such as a mask that some of them lack, is
    left out: one graph cannot serve them all.

    Args:
        record: runs the model and returns the inputs of each submodule.
        recorded: those on the example.
        inputs: the example.
        free: the free axes of the model's inputs.
    """
    found = {name: batch_axes(calls[0]) for name, calls in recorded.items() if all(map(_alike(calls[0]), calls))}
    # A size that differs between two calls of the example is free without a further run.
    for name in found:
        first, *later = recorded[name]
        for call in later:
            _free_changed_axes(found[name], first, call, BATCH)
    # Further sizes change with those of the model's inputs, which runs at other sizes show.
    for other in other_sizes(inputs, free):
        try:
            seen = record(*other.inputs)
        except CaptureError:  # the model does not take this size
            continue
        for name in found.keys() & seen.keys():
            if not _alike(recorded[name][0])(seen[name][0]):
                del found[name]
                continue
            _free_changed_axes(found[name], recorded[name][0], seen[name][0], other.axis_name)
    return found


def _alike(first: Inputs) -> Callable[[Inputs], bool]:
    """Return a function that returns True for a call that differs from a first one in sizes alone."""
    values, form = pytree.tree_flatten(first)

    def alike(call: Inputs) -> bool:
        others, other_form = pytree.tree_flatten(call)
        return bool(form == other_form) and all(map(_is_alike, values, others))

    return alike


def _is_alike(value: Any, other: Any) -> bool:
    if not isinstance(value, Tensor):
        return is_same_constant(value, other)
    return isinstance(other, Tensor) and (value.ndim, value.dtype) == (other.ndim, other.dtype)


def _free_changed_axes(free: FreeAxes, before: Inputs, after: Inputs, label: str) -> None:
    pairs = zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=False)
    for axes, (x, y) in zip(free, pairs, strict=False):
        if isinstance(x, Tensor) and isinstance(y, Tensor) and x.ndim == y.ndim:
            for axis in range(x.ndim):
                if x.shape[axis] != y.shape[axis]:
                    axes.setdefault(axis, label)
