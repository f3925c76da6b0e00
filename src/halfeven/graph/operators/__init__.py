"""List all operators, each in a row with its facts.

Placement, algorithms and runtimes read kinds and facts alone, so that a new operator is a new row. Operators without a
row run in float, and the plan says so.
"""

from typing import Any

from torch import nn

from halfeven.graph.operators import elementwise, layers, reductions, shapes
from halfeven.graph.operators.row import TRANSPARENT, UNKNOWN, WEIGHTED, Arguments, Call, Operator, OperatorKind

__all__ = [
    "OPERATORS",
    "ROWS",
    "TRANSPARENT",
    "WEIGHTED",
    "Arguments",
    "Call",
    "Operator",
    "OperatorKind",
    "is_stochastic_depth",
    "row_of",
    "row_of_module",
]

OPERATORS: tuple[Operator, ...] = (
    *layers.MODULES,
    *layers.FUNCTIONS,
    *layers.RECURRENT,
    *layers.PRODUCTS_IN_FLOAT,
    *elementwise.ACTIVATIONS,
    *elementwise.ARITHMETIC,
    *elementwise.IN_FLOAT,
    *reductions.OVER_WINDOWS,
    *reductions.OVER_AXES,
    *shapes.MOVES,
    *shapes.PARTS,
    *shapes.COPIES,
    *shapes.JOINS,
)

ROWS: dict[Any, Operator] = {row.target: row for row in OPERATORS}

STOCHASTIC_DEPTH = ("DropPath", "StochasticDepth")
"""Suffixes of class names for stochastic depth, in any library. Capture keeps these modules, although they do nothing
in eval mode."""


def row_of(target: Any) -> Operator:
    """Return the row of an overload or function; `UNKNOWN` where there is none."""
    return ROWS.get(target, UNKNOWN)


def row_of_module(module: nn.Module) -> Operator:
    """Return the row of a module's type or of its nearest base class that has a row; `UNKNOWN` where there is none."""
    # A subclass of a layer (timm's Linear, a padded convolution) computes as its base class does.
    for ancestor in type(module).__mro__:
        if ancestor in ROWS:
            return ROWS[ancestor]
    if is_stochastic_depth(module):
        return Operator(target=type(module), kind=OperatorKind.IDENTITY)
    return UNKNOWN


def is_stochastic_depth(module: nn.Module) -> bool:
    """Return True for a module that drops whole samples of a residual branch in training."""
    return type(module).__name__.endswith(STOCHASTIC_DEPTH)
