"""Forward passes that start again where a change begins to matter.

A model is run once from input to output, and stops before each quantizer that is to be changed. From there the rest
runs with the change, on the values that later operators read. So a change costs the part of the model behind it, and
memory holds the values that are alive at one place of the graph.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from halfeven.graph.batches import Inputs
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.torch_private import pytree
from halfeven.graph.view import Op, operations
from halfeven.graph.wrappers import unwrapped
from halfeven.placement.execution_graph import fused_graph
from halfeven.quantization.quantizer import Quantizer


def float_tensors(outputs: Any) -> list[Tensor]:
    """Return all floating-point tensors of a model's outputs."""
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


@dataclass
class Stop:
    """A forward pass that stopped before a node."""

    position: int
    values: dict[fx.Node, Any]
    """The values that this node or a later one reads."""
    inputs: Inputs = ((), {})


class RestartedForward:
    """Runs a captured model node by node, and restarts it at any node.

    Args:
        region: the captured graph of a whole model.
    """

    def __init__(self, region: CapturedModule) -> None:
        self.region = region
        graph = fused_graph(region)  # the order that the model runs in: fewer values are quantized
        self.operations = operations(graph)
        self.graph = graph
        # Later positions overwrite earlier ones, so that a node's last reader is left.
        self.last_read = {
            node: position for position, op in enumerate(self.operations) for node in op.node.all_input_nodes
        }

    def first_use(self, quantizers: Collection[Quantizer]) -> int:
        """Return the position of the first node that calls any of these quantizers, itself or inside of a layer."""
        wanted = set(quantizers)
        for position, op in enumerate(self.operations):
            if op.is_module and any(module in wanted for module in op.module.modules()):
                return position
        return 0

    def start(self, inputs: Inputs) -> Stop:
        """Return the forward pass of a batch before its first node."""
        args, kwargs = inputs
        placeholders = [op.node for op in self.operations if op.is_input]
        return Stop(0, dict(zip(placeholders, self.region.flat_inputs(*args, **kwargs), strict=True)))

    def advance(self, stop: Stop, position: int) -> None:
        """Run a forward pass on to a later position."""
        for number in range(stop.position, position):
            self._run_operation(number, stop.values)
        stop.position = max(stop.position, position)

    def outputs(self, stop: Stop) -> list[Tensor]:
        """Run the rest of a forward pass, which itself stays where it is, and return the outputs."""
        # A copy of the table and not of the tensors: the run below removes what it has read for the last time.
        rest = Stop(stop.position, dict(stop.values))
        last = len(self.operations) - 1
        self.advance(rest, last)
        return float_tensors(
            fx.node.map_arg(self.operations[last].node.args, lambda node: self._operand_value(node, rest))
        )

    def _run_operation(self, number: int, values: dict[fx.Node, Any]) -> None:
        op = self.operations[number]
        # The values of inputs are there from the start, and constants are read where they are used.
        if op.is_input or op.is_constant:
            return
        stop = Stop(number, values)
        args = fx.node.map_arg(op.node.args, lambda node: self._operand_value(node, stop))
        kwargs = fx.node.map_arg(op.node.kwargs, lambda node: self._operand_value(node, stop))
        call = op.module if op.is_module else op.function
        values[op.node] = call(*args, **kwargs)
        for node in op.node.all_input_nodes:
            # Nothing later reads the value, so its memory is free.
            if self.last_read[node] == number:
                values.pop(node, None)

    def _operand_value(self, node: fx.Node, stop: Stop) -> Any:
        op = Op(node)
        return op.constant if op.is_constant else stop.values[node]


class WholeForward:
    """Runs a model whole each time: one that is captured in parts, with Python between them.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def first_use(self, quantizers: Collection[Quantizer]) -> int:
        """Return the only position."""
        return 0

    def start(self, inputs: Inputs) -> Stop:
        """Return the forward pass of a batch before it begins."""
        return Stop(0, {}, inputs)

    def advance(self, stop: Stop, position: int) -> None:
        """Do nothing: the model has no other position."""

    def outputs(self, stop: Stop) -> list[Tensor]:
        """Run the model and return the outputs."""
        args, kwargs = stop.inputs
        return float_tensors(self.model(*args, **kwargs))


def forward_of(qmodel: nn.Module) -> RestartedForward | WholeForward:
    """Return how a model is run: from any node, where its graph is captured whole."""
    inside = unwrapped(qmodel)
    return RestartedForward(inside) if isinstance(inside, CapturedModule) else WholeForward(qmodel)
