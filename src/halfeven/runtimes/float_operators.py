"""Operators that a runtime computes in float, computed by the runtime itself.

The last bits of a softmax, a GELU or a normalization are those of one version's kernel on one processor. Where a
quantizer reads them, one such bit moves an integer now and then, and everything behind it. An exact simulation
therefore does not guess: the runtime computes such an operator, on the numbers that were simulated before it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.deployment.exported_program import exported_program
from halfeven.graph.model_inputs import BATCH, constant_size
from halfeven.graph.operators import OperatorKind
from halfeven.graph.torch_private import forgetting_graphs
from halfeven.graph.view import Op, kind_of, module_of

K = OperatorKind

Function = Callable[[Sequence[Tensor], Mapping[str, Tensor]], Tensor]
"""From inputs, and constants by name, to a result."""


def needs_runtime_kernel(node: fx.Node) -> bool:
    """Return True if the last bits of an operator's float result depend on the runtime's kernel."""
    operands = [operand for operand in Op(node).inputs if not operand.is_constant]
    if not Op(node).yields_floats or not any(operand.is_float_tensor for operand in operands):
        return False
    if not Op(node).is_tensor and not all(reader.takes_result for reader in Op(node).readers):
        return False
    return Op(node).has_kernel_rounding


MAX_FUNCTIONS = 512
"""Largest number of functions that are kept for later simulations: more than a large network has, which would otherwise
make all of them anew in each batch."""

_kept: dict[object, Function] = {}


class FloatOperators:
    """The operators that a runtime computes for the simulation.

    Equal operators share a function, those of another model too: it takes longer to make than to run.

    Args:
        function_of: makes a function that the runtime computes of a program.
        constants_are_inputs: True where such a function can be given other constants than its program had. Operators
            that differ in their constants alone then share a function.
    """

    def __init__(
        self, function_of: Callable[[torch.export.ExportedProgram], Function], *, constants_are_inputs: bool = False
    ) -> None:
        self.function_of = function_of
        self.constants_are_inputs = constants_are_inputs
        self.modules: dict[object, tuple[fx.GraphModule, object]] = {}

    def compute_results(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """Return the result of an operator, or the tuple of its results, of which those that nothing reads are None."""
        if Op(node).is_tensor:
            return self.compute([node], values)
        results: list[Tensor | None] = [None] * len(Op(node).value)
        for reader in Op(node).readers:
            (_, index) = reader.node.args
            assert isinstance(index, int)
            results[index] = self.compute([node, reader.node], values)
        return tuple(results)

    def compute(self, nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any]) -> Tensor:
        """Return the last result of a chain of operators, which the runtime computes as one file.

        Args:
            nodes: operators in their order.
            values: of all that they read; numbers, and constants of the model, are part of the file.
        """
        inputs = [node for node, value in values.items() if _is_tensor_input(node, value)]
        read = [values[node].contiguous() for node in inputs]
        free = [free_axes(node) for node in inputs]
        # Numbers are part of the file, so that another number needs another file.
        numbers = repr([value for value in values.values() if not isinstance(value, Tensor)])
        if (nodes[-1], numbers) not in self.modules:
            with forgetting_graphs():
                module, description = _operators_alone(nodes, values)
            # Where constants are part of the file, operators share one only if their constants are equal.
            constants = b"" if self.constants_are_inputs else _digest_of_values(module.state_dict())
            self.modules[nodes[-1], numbers] = module, (description, constants)
        module, computed = self.modules[nodes[-1], numbers]
        shape = read[0].shape
        shapes = tuple((tuple(x.shape), x.dtype) for x in read)
        elementwise = len(read) == len(nodes) == 1 and kind_of(nodes[0]) is K.ACTIVATION and shape.numel() > 1
        if elementwise:  # one function for all shapes
            read = [read[0].flatten()]
            shapes = (read[0].dtype,)
            free = [(0,)]
        # A function depends on the runtime, the operators with their numbers, the sizes and types of what they read,
        # and the axes that are free.
        key = (self.function_of, computed, shapes, tuple(free))
        function = _kept.get(key)
        if function is None:
            with forgetting_graphs():
                function = self.function_of(exported_program(module, tuple(read), {}, free))
            if len(_kept) >= MAX_FUNCTIONS:
                _kept.pop(next(iter(_kept)), None)  # the oldest
            _kept[key] = function
        result = function(read, module.state_dict())
        return result.reshape(shape) if elementwise else result


def free_axes(node: fx.Node) -> tuple[int, ...]:
    """Return the axes of a tensor that are free in the file: the runtime has other kernels for sizes that it knows.

    In a file in which the batch alone is free it is the first axis.
    """
    region: Any = node.graph.owning_module
    labels = {name for known in region.region_inputs if known is not None for name in known.free.values()}
    if labels <= {BATCH}:
        return (0,)
    sizes = getattr(Op(node).value, "shape", ())
    return tuple(axis for axis, size in enumerate(sizes) if constant_size(size) is None)


def _operators_alone(nodes: Sequence[fx.Node], values: Mapping[fx.Node, Any]) -> tuple[fx.GraphModule, str]:
    """Return a module of the operators alone, and its description, which leaves out the values of its constants.

    Modules with the same description compute the same function of inputs and constants.
    """
    graph = fx.Graph()
    parts = dict[str, Any]()
    made: dict[fx.Node, Any] = {}
    for node, value in values.items():
        if _is_tensor_input(node, value):
            made[node] = graph.placeholder(f"input_{len(made)}")
        elif isinstance(value, Tensor):
            parts[name := f"constant_{len(parts)}"] = nn.Buffer(value)
            made[node] = graph.get_attr(name)
        else:
            made[node] = value
    for index, node in enumerate(nodes):
        target = node.target
        if node.op == "call_module":
            parts[target := f"module_{len(parts)}"] = module_of(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
        made[node] = graph.create_node(node.op, target, args, kwargs, f"operator_{index}")
    graph.output(made[nodes[-1]])
    module = fx.GraphModule(parts, graph).eval()
    kept = [f"{name}: {_description(part)}" for name, part in parts.items()]
    return module, "\n".join((module.code, *kept))


def _description(part: nn.Module | Tensor) -> str:
    return f"{type(part)} {part}" if isinstance(part, nn.Module) else f"{part.dtype} {tuple(part.shape)}"


def _digest_of_values(constants: Mapping[str, Tensor]) -> bytes:
    """Return a digest of the values of constants."""
    return hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in constants.values())).digest()


def _is_tensor_input(node: fx.Node, value: Any) -> bool:
    return isinstance(value, Tensor) and node.op != "get_attr"
