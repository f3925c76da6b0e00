"""Keep the float parameters of layers that are called several times, for their later calls in the float stream."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from halfeven.graph.view import Op
from halfeven.layerwise.blocks import Block


def shared_parameters(blocks: Iterable[Block]) -> dict[Tensor, Tensor]:
    """Return copies of the weights and biases of the layers that the blocks call more than once, by parameter.

    The first call decides the rounding of such a layer, and the float model's weight is gone for the others. Layers
    that are called once need no copy: the float stream has passed them before they change.
    """
    layers: list[Any] = [Op(node).module for block in blocks for node in block.layers]
    shared = [layer for layer, calls in Counter(layers).items() if calls > 1]
    return {parameter: parameter.detach().clone() for layer in shared for parameter in layer.parameters(recurse=False)}


@contextmanager
def with_values(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Give parameters other values within the context."""
    present = {parameter: parameter.data for parameter in values}
    for parameter, value in values.items():
        parameter.data = value
    try:
        yield
    finally:
        for parameter, value in present.items():
            parameter.data = value
