"""The axes that stay free in capture: the batch, and those that the user names in `dynamic_shapes`."""

import dataclasses
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import ConfigError
from halfeven.graph.batches import sample_count
from halfeven.graph.model_inputs import BATCH, leaf_names
from halfeven.graph.torch_private import pytree
from halfeven.nearest import did_you_mean

DynamicShapes = dict[str, dict[int, str]]
"""Input name -> {axis: the axis's name}. Axes of the same name have the same size."""

PLAIN_DICTS = (dict, OrderedDict, defaultdict)

FreeAxes = list[dict[int, str]]
"""For each leaf of a call's arguments the names of its free axes, by their numbers."""


def as_dynamic_shapes(values: Mapping[str, Mapping[Any, str]]) -> DynamicShapes:
    """Return dynamic shapes that JSON gave back, in which the axes have become texts."""
    return {name: {int(axis): label for axis, label in axes.items()} for name, axes in values.items()}


def free_axes(model: nn.Module, args: Any, kwargs: Any, dynamic_shapes: DynamicShapes) -> FreeAxes:
    """Return the free axes of a model's inputs: those of `dynamic_shapes`, and the batch.

    Args:
        model: the model, whose forward names the inputs.
        args: positional arguments of the example.
        kwargs: keyword arguments of the example.
        dynamic_shapes: the axes to free besides the batch.

    Raises:
        ConfigError: an input or axis that does not exist, a size of 0 or 1, or one name for axes of different sizes.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    names = leaf_names(model, args, kwargs)
    tensors = {name: leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)}
    named = {name: _axes_from_front(name, tensors, axes) for name, axes in dynamic_shapes.items()}
    _check_equal_sizes(tensors, named)
    # Where the user names the first axis of an input, that is the batch, and its name in all inputs.
    own = next((name for name, axes in named.items() if 0 in axes), None)
    batch = batch_axes(leaves) if own is None else batch_axes(leaves, named[own][0], len(tensors[own]))
    return [axes | named.get(name, {}) for name, axes in zip(names, batch, strict=True)]


def batch_axes(inputs: Any, label: str = BATCH, samples: int | None = None) -> FreeAxes:
    """Return the first axis of each leaf that is a tensor of as many samples as the batch.

    Args:
        inputs: a call's arguments.
        label: name of the axis.
        samples: size of the batch; None: what `sample_count` takes for it.
    """
    samples = sample_count(inputs) if samples is None else samples
    leaves = pytree.tree_leaves(inputs)
    return [{0: label} if isinstance(x, Tensor) and x.ndim and len(x) == samples else {} for x in leaves]


def _axes_from_front(name: str, tensors: dict[str, Tensor], axes: dict[int, str]) -> dict[int, str]:
    """Return the named axes of an input with their numbers counted from the front."""
    if name not in tensors:
        raise ConfigError(
            f'dynamic_shapes names the input "{name}", and the model has no such input, so no axis would be freed. '
            f"{did_you_mean(name, tensors)}"
        )
    ndim = tensors[name].ndim
    if wrong := [axis for axis in axes if not -ndim <= axis < ndim]:
        raise ConfigError(
            f'dynamic_shapes frees axis {wrong[0]} of the input "{name}", whose example has {ndim} axes, '
            f"{list(tensors[name].shape)}. Count the axes from 0."
        )
    if wrong_names := [label for label in axes.values() if not label.isidentifier()]:
        raise ConfigError(
            f'dynamic_shapes calls an axis of the input "{name}" {wrong_names[0]!r}, and files cannot carry this name. '
            "Use letters, digits and underscores."
        )
    return {axis % ndim: label for axis, label in axes.items()}


def _check_equal_sizes(tensors: dict[str, Tensor], named: DynamicShapes) -> None:
    first: dict[str, tuple[str, int, int]] = {}
    for name, axes in named.items():
        for axis, label in axes.items():
            size = tensors[name].shape[axis]
            if size < 2 and axis != 0:
                raise ConfigError(
                    f'dynamic_shapes frees axis {axis} of the input "{name}", and the example\'s size there is {size}: '
                    "torch.export makes 0 and 1 constants, so the axis would not be free. Give an example with at "
                    "least 2."
                )
            other = first.setdefault(label, (name, axis, size))
            if other[2] != size:
                raise ConfigError(
                    f'dynamic_shapes gives axis {other[1]} of "{other[0]}" and axis {axis} of "{name}" one name, '
                    f'"{label}", and the example has sizes {other[2]} and {size}, so they are not equal. Give them '
                    "different names."
                )


def nested_shapes(arguments: Any, shapes: Iterable[Any]) -> Any:
    """Return the shapes of a call's leaves, nested as its arguments: `torch.export` takes lists for users' classes."""
    given = iter(shapes)

    def nested(value: Any) -> Any:
        parts, form = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
        if form.is_leaf():
            return next(given)
        found = [nested(part) for part in parts]
        own_class = dataclasses.is_dataclass(value) or (isinstance(value, dict) and type(value) not in PLAIN_DICTS)
        return found if own_class else pytree.tree_unflatten(found, form)

    return nested(arguments)


def export_shapes(free: FreeAxes) -> list[Any]:
    """Return each leaf's shape for `torch.export`: the user's axes must stay free, the batch may become constant."""
    dim = torch.export.Dim
    return [
        {axis: dim.AUTO if label == BATCH else dim.DYNAMIC for axis, label in axes.items()} or None for axes in free
    ]
