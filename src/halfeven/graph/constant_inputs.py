"""The inputs of a captured model that are no tensors: None, switches, numbers. They are constants of its graph."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.errors import InputError
from halfeven.graph.batches import Inputs
from halfeven.graph.model_inputs import leaf_names
from halfeven.graph.torch_private import input_keywords, pytree

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class ConstantInput:
    """An input that the example gave no tensor for."""

    place: int
    """Place among the graph's inputs."""
    name: str
    value: Any


def constant_inputs(model: nn.Module, inputs: Inputs, graph: fx.Graph) -> tuple[ConstantInput, ...]:
    """Return the inputs that are constants of a captured graph.

    Args:
        model: the model, whose forward names the inputs.
        inputs: the example.
        graph: what torch.export made of the model.
    """
    leaves, form = pytree.tree_flatten(inputs)
    args, kwargs = pytree.tree_unflatten(list(range(len(leaves))), form)
    ordered = pytree.tree_leaves((args, {name: kwargs[name] for name in input_keywords(graph)}))
    names = leaf_names(model, *inputs)
    return tuple(
        ConstantInput(place, names[leaf], leaves[leaf])
        for place, leaf in enumerate(ordered)
        if not isinstance(leaves[leaf], Tensor)
    )


def check_constants(constants: Iterable[ConstantInput], values: Sequence[Any], part: str = "") -> None:
    """Check that the inputs of a call that are no tensors are those that the graph was captured with.

    Args:
        constants: the constants of the graph.
        values: the call's leaves, in the order of the graph's inputs.
        part: name of the captured part of the model; "" for the whole model.

    Raises:
        InputError: one has another value, such as a mask where the example had None.
    """
    for known in constants:
        value = values[known.place] if known.place < len(values) else known.value
        if not is_same_constant(known.value, value):
            given = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise InputError(
                f"The input {known.name}{f' of {part}' if part else ''} is {given}, and the model was prepared with "
                f"{known.value!r}, which is a constant of its graph. So the result would be that for {known.value!r}. "
                "Prepare the model with an example like this call."
            )


def is_same_constant(known: Any, value: Any) -> bool:
    """Return True for two equal values that are no tensors; a size that torch.export traces may have any value."""
    if isinstance(value, SYMBOLS) or value is known:
        return True
    try:
        return not isinstance(value, Tensor) and bool(value == known)
    except Exception:  # a class of the user's compares as it likes
        return False
