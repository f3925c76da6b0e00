"""A node of a captured graph, as the rest of halfeven reads it.

`torch.fx` says what a node is in strings (`op`), dotted names (`target`) and a dictionary (`meta`). They are looked up
here and nowhere else.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from halfeven.graph import operators
from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import arguments


@dataclass(frozen=True)
class Op:
    """A read-only view of one node of a graph.

    Two views of the same node are equal, and a view can be a key of a dictionary. It holds no facts of its own: after
    the graph has changed, it shows the change.
    """

    node: fx.Node

    # What it is

    @property
    def is_input(self) -> bool:
        """True for an input of the graph."""
        return self.node.op == "placeholder"

    @property
    def is_constant(self) -> bool:
        """True for a parameter, a buffer or a constant of the module."""
        return self.node.op == "get_attr"

    @property
    def is_output(self) -> bool:
        """True for the node that returns the results."""
        return self.node.op == "output"

    @property
    def is_module(self) -> bool:
        """True for the call of a module."""
        return self.node.op == "call_module"

    @property
    def is_function(self) -> bool:
        """True for the call of an operator that is no module."""
        return self.node.op == "call_function"

    @property
    def kind(self) -> OperatorKind:
        """What the operator does to scales, as its row in `halfeven.graph.operators` says."""
        return operators.kind_of(self.node)

    @property
    def module(self) -> nn.Module | None:
        """The module that is called; None for any other node."""
        return operators.module_of(self.node) if self.is_module else None

    @property
    def function(self) -> Any:
        """The overload that is called, such as `torch.ops.aten.relu.default`; None for any other node."""
        return self.node.target if self.is_function else None

    # What it is called

    @property
    def name(self) -> str:
        """The operator's short name: "Conv2d", "relu", "add"."""
        return operators.operator_name(self.node)

    @property
    def path(self) -> str:
        """The dotted path of the module or the constant, or the input's name; for a function, the path of the module
        whose code calls it, "" where none is known."""
        if not self.is_function:
            return str(self.node.target)
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]) if stack else ""

    @property
    def parent_path(self) -> str:
        """The path without its last part; "" at the top."""
        return self.path.rpartition(".")[0]

    @property
    def last_name(self) -> str:
        """The last part of the path: "weight" of "layer1.0.conv1.weight"."""
        return self.path.rpartition(".")[2]

    # What it computes

    def argument(self, name: str) -> Any:
        """Return the argument of an operator by the name that ATen's schema gives it, or its default.

        Raises:
            KeyError: the operator has no parameter of this name.
        """
        return self.arguments[name]

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of an operator by the names of ATen's schema, defaults filled in."""
        return arguments(self.node)

    @property
    def constant(self) -> Any:
        """The parameter, buffer or constant that a node reads.

        Raises:
            AttributeError: the node reads none.
        """
        if not self.is_constant:
            raise AttributeError(f"{self.node} reads no constant")
        value: Any = self.node.graph.owning_module
        for part in self.path.split("."):
            value = getattr(value, part)
        return value

    @property
    def value(self) -> Any:
        """The result as capture recorded it: a tensor without data, a number, or a list of these; None if nothing
        was recorded."""
        return self.node.meta.get("val")

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the result; a free axis is a `torch.SymInt`. Only for a node that yields one tensor."""
        return tuple(self.value.shape)

    @property
    def ndim(self) -> int:
        """The number of axes of the result. Only for a node that yields one tensor."""
        return len(self.shape)

    @property
    def is_tensor(self) -> bool:
        """True if the result is one tensor."""
        return isinstance(self.value, Tensor)

    @property
    def is_float_tensor(self) -> bool:
        """True if the result is one tensor of real numbers, not of integers or booleans."""
        return isinstance(self.value, Tensor) and self.value.is_floating_point()

    # What is around it

    @property
    def inputs(self) -> tuple["Op", ...]:
        """The nodes whose results the node reads, each once, in the order of its arguments."""
        return tuple(Op(node) for node in self.node.all_input_nodes)

    @property
    def readers(self) -> tuple["Op", ...]:
        """The nodes that read the result, in the order in which they began to."""
        return tuple(Op(node) for node in self.node.users)

    @property
    def only_reader(self) -> "Op | None":
        """The node that reads the result where it is the only one; else None."""
        readers = self.readers
        return readers[0] if len(readers) == 1 else None


def operations(graph: fx.Graph) -> list[Op]:
    """Return views of all nodes of a graph, in its order; the graph may be changed while the list is walked."""
    return [Op(node) for node in graph.nodes]


def module_calls(graph: fx.Graph) -> list[Op]:
    """Return views of the nodes that call modules, in the graph's order; a module called twice stands there twice."""
    return [Op(node) for node in graph.nodes if node.op == "call_module"]


def replace_call(node: fx.Node, target: Any, args: Iterable[Any], kwargs: dict[str, Any] | None = None) -> None:
    """Let a node call another operator or module, in place; its readers and its recorded result stay.

    Args:
        node: a call of a function or a module.
        target: an operator's overload, or the path of a module.
        args: the new positional arguments.
        kwargs: the new keyword arguments.
    """
    node.op = "call_module" if isinstance(target, str) else "call_function"
    node.target = target
    node.args = tuple(args)
    node.kwargs = kwargs or {}


def record_value(node: fx.Node, value: Any) -> None:
    """Record the result of a node that was added or changed after capture: a tensor without data, or a number."""
    node.meta["val"] = value
