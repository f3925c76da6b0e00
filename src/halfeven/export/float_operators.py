"""Operators that a runtime computes in float, asked of the runtime itself.

The last bits of a softmax, a GELU or a normalization are those of one version's kernel on one processor. Where a
quantizer reads them, one such bit moves an integer now and then, and everything behind it. An exact simulation
therefore does not guess: the runtime computes such an operator, on the numbers that were simulated before it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from halfeven.export.exporting import exported_program
from halfeven.graph.operators import OperatorKind, clipping, kind_of
from halfeven.graph.restoration import CapturedModule

aten = torch.ops.aten
K = OperatorKind

ASKED_KINDS = frozenset((K.NORMALIZATION, K.BATCH_NORM, K.SOFTMAX, K.INTERPOLATION, K.AVERAGE, K.MATMUL))
"""Kinds whose result depends on how a kernel orders its operations."""

ASKED_FUNCTIONS = frozenset(
    (
        *(aten.exp.default, aten.expm1.default, aten.log.default, aten.log1p.default, aten.erf.default),
        *(aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.sin.default, aten.cos.default, aten.rms_norm.default),
        *(aten.sum.dim_IntList, aten.var.correction, aten.linalg_vector_norm.default, aten.logsumexp.default),
    )
)
"""Functions without a kind of their own of which the same is true."""

ROUNDED_ONCE = frozenset((aten.relu.default, aten.leaky_relu.default, aten.prelu.default))
"""Activations of which IEEE 754 leaves nothing open."""

Function = Callable[[Sequence[Tensor]], Tensor]


class FloatOperators:
    """The operators of a region that its runtime is asked for.

    Args:
        region: what they are part of.
        function_of: makes a function that the runtime computes of a program.
    """

    def __init__(self, region: CapturedModule, function_of: Callable[[torch.export.ExportedProgram], Function]) -> None:
        self.region = region
        self.function_of = function_of
        self.functions: dict[object, Function] = {}

    def compute(self, nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any]) -> Tensor:
        """What the runtime makes of operators one behind the other, as one file: the result of the last.

        Args:
            nodes: operators in their order.
            values: of all that they read; numbers, and constants of the model, are part of the file.
        """
        read = [value for node, value in values.items() if _is_input(node, value)]
        key = (*map(_identity, nodes), *(tuple(x.shape) if isinstance(x, Tensor) else x for x in values.values()))
        if key not in self.functions:
            self.functions[key] = self.function_of(exported_program(self._alone(nodes, values), tuple(read), {}))
        return self.functions[key](read)

    def _alone(self, nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any]) -> fx.GraphModule:
        graph = fx.Graph()
        made: dict[fx.Node, Any] = {}
        for node, value in values.items():
            if _is_input(node, value):
                made[node] = graph.placeholder(node.name)
            else:
                made[node] = graph.node_copy(node) if node.op == "get_attr" else value
        for node in nodes:
            made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(made[nodes[-1]])
        return fx.GraphModule(self.region, graph).eval()


def _is_input(node: fx.Node, value: Any) -> bool:
    return isinstance(value, Tensor) and node.op != "get_attr"


def is_asked(node: fx.Node) -> bool:
    """Whether the result of an operator on float tensors is the runtime's own in its last bits."""
    kind = kind_of(node)
    if kind is K.ACTIVATION:
        return clipping(node) is None and node.target not in ROUNDED_ONCE
    return kind in ASKED_KINDS or node.target in ASKED_FUNCTIONS


def _identity(node: fx.Node) -> object:
    """What two operators have in common that are one function: the same, unless they have constants of their own."""
    if node.op == "call_module" or any(operand.op == "get_attr" for operand in node.all_input_nodes):
        return node
    operands = {operand: index for index, operand in enumerate(node.all_input_nodes)}
    return repr((node.target, fx.map_arg((node.args, node.kwargs), lambda operand: f"operand {operands[operand]}")))
