"""Conditions on the sizes of free axes under which a captured graph computes what the model does.

Where a model's code decides by a size, torch.export takes the decision of the example and notes its condition: a height
that is a multiple of 8, a text no longer than the table of positions, a height that equals the width.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from halfeven.errors import InputError
from halfeven.graph.constant_inputs import check_constants
from halfeven.graph.fixed_axes import SIZE_PATTERN, leaf_and_axis
from halfeven.graph.model_inputs import BATCH, ModelInput, check_sizes
from halfeven.graph.torch_private import size_guards


@dataclass(frozen=True)
class SizeRelation:
    """A condition on sizes."""

    expression: str
    """In Python; `sizes[0][2]` is the size of axis 2 of the graph's first input."""
    words: str
    """With the axes' names: "height % 8 == 0"."""
    axes: tuple[tuple[int, int, str], ...]
    """Input, axis and name of each size in it."""


def size_relations(
    program: torch.export.ExportedProgram, inputs: Sequence[ModelInput | None]
) -> tuple[SizeRelation, ...]:
    """Return the conditions of a program that are about axes with names.

    Conditions on the batch alone are left out, as are those that exclude single sizes (torch.export takes 0 and 1 for
    special cases, of which the operators themselves take care).
    """
    places = {known.name: place for place, known in enumerate(inputs) if known is not None}
    found = []
    for guard in size_guards(program):
        axes = [leaf_and_axis(groups) for groups in re.findall(SIZE_PATTERN, guard)]
        if not axes or any(name not in places for name, _ in axes):
            continue
        named = dict.fromkeys((places[name], axis, _axis_label(inputs, places[name], axis)) for name, axis in axes)
        if "!=" in guard or all(label == BATCH for _, _, label in named):
            continue
        expression = re.sub(SIZE_PATTERN, lambda size: _size_expression(size.groups(), places), guard)
        words = re.sub(SIZE_PATTERN, lambda size: _size_words(size.groups(), inputs, places), guard)
        found.append(SizeRelation(expression, words, tuple(named)))
    return tuple(found)


def _axis_label(inputs: Sequence[ModelInput | None], place: int, axis: int) -> str:
    known = inputs[place]
    assert known is not None
    return known.free.get(axis, f"axis {axis} of {known.name}")


def _size_expression(groups: Sequence[str], places: dict[str, int]) -> str:
    name, axis = leaf_and_axis(groups)
    return f"sizes[{places[name]}][{axis}]"


def _size_words(groups: Sequence[str], inputs: Sequence[ModelInput | None], places: dict[str, int]) -> str:
    name, axis = leaf_and_axis(groups)
    return _axis_label(inputs, places[name], axis)


def check_relations(relations: Sequence[SizeRelation], values: Sequence[Any]) -> None:
    """Check the conditions on the sizes of a call's tensors; not while the call is traced.

    Raises:
        InputError: a condition does not hold.
    """
    if not relations or torch.compiler.is_compiling():
        return
    sizes = [value.shape if isinstance(value, Tensor) else () for value in values]
    for relation in relations:
        here = [sizes[place][axis] for place, axis, _ in relation.axes]
        # torch.export treats a size of 1 as a case of its own, and a symbol is not known yet.
        if 1 in here or any(type(size) is not int for size in here):
            continue
        if not eval(_compiled_expression(relation.expression), {"sizes": sizes, "torch": torch, "math": math}):
            told = ", ".join(f"{label} is {size}" for (_, _, label), size in zip(relation.axes, here, strict=True))
            raise InputError(
                f"The captured graph is right only where {relation.words}, because the model's code decides by these "
                f"sizes, and {told}. So the result would be wrong. Give inputs of such sizes, or give prepare an "
                "example of the sizes that you need."
            )


@cache
def _compiled_expression(expression: str) -> CodeType:
    return compile(expression, "<sizes>", "eval")


def check_call(region: Any, values: Sequence[Any]) -> None:
    """Check the values that a captured module is called with, in the order of its graph's inputs.

    Raises:
        InputError: the graph would compute other results than the model.
    """
    check_sizes(region.region_inputs, values, region.region_name)
    check_constants(region.constant_inputs, values, region.region_name)
    check_relations(region.size_relations, values)


def sizes_checked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a captured module with a check of its inputs' sizes before it."""

    @wraps(forward)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # the compiler cannot trace the check; it compiles anew for each size
            check_call(self, self.flat_inputs(*args, **kwargs))
        return forward(self, *args, **kwargs)

    return run
