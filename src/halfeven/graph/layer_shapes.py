"""The sizes of a layer that decide which kernel a runtime has for it, of a module or of a function."""

from dataclasses import dataclass
from typing import Any

from torch import fx

from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import Op, kind_of, module_of


@dataclass(frozen=True)
class ConvolutionShape:
    """The sizes of a convolution, transposed or not."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int
    inputs_per_group: int

    @staticmethod
    def of(node: fx.Node) -> "ConvolutionShape":
        """Return the sizes of the call of a convolution."""
        first, second, *kernel = weight_shape(node)
        groups = groups_of(node)
        stride: Any = module_of(node).stride if Op(node).is_module else Op(node).arguments["stride"]
        strides = tuple(stride) if isinstance(stride, tuple | list) else (stride,)
        return ConvolutionShape(
            kernel=tuple(kernel),
            # A single number stands for all axes.
            stride=tuple(int(step) for step in strides) * (len(kernel) if len(strides) == 1 else 1),
            groups=groups,
            # A transposed convolution's weight is [inputs, outputs / groups, ...].
            inputs_per_group=first // groups if kind_of(node) is OperatorKind.TRANSPOSED_CONVOLUTION else second,
        )


def weight_shape(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a layer's weight."""
    if Op(node).is_module:
        weight = module_of(node).weight
        return tuple(int(size) for size in weight.shape)  # type: ignore[union-attr]
    weight_node = node.args[1]
    assert isinstance(weight_node, fx.Node)
    return tuple(int(size) for size in Op(weight_node).shape)


def channel_axis(layer: fx.Node, tensor: fx.Node) -> int:
    """Return the axis of a layer's input or output, `tensor`, that its channels lie on."""
    ndim = Op(tensor).ndim
    # A linear layer's channels are the last axis. Behind a convolution's are as many axes as its kernel has.
    return ndim - 1 if kind_of(layer) is OperatorKind.LINEAR else ndim - len(weight_shape(layer)) + 1


def groups_of(node: fx.Node) -> int:
    """Return the groups of a convolution; 1 for other layers."""
    if Op(node).is_module:
        return int(getattr(module_of(node), "groups", 1))
    return int(Op(node).arguments.get("groups", 1))
