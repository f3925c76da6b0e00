"""Read and change the nodes of a captured graph through a typed view.

`torch.fx` describes a node by strings (`op`), dotted names (`target`) and a dictionary (`meta`). This module alone
interprets them.
"""

import math
import operator
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from halfeven.graph.operators import TRANSPARENT, WEIGHTED, Call, Operator, OperatorKind, row_of, row_of_module
from halfeven.graph.torch_private import is_operator, parameters_of, pytree, short_name

K = OperatorKind
GRAPH_ENDS = {"placeholder": K.INPUT, "get_attr": K.CONSTANT, "output": K.OUTPUT}


@dataclass(frozen=True)
class Op:
    """A read-only view of a node of a graph.

    Two views of the same node are equal, and a view can be a key of a dictionary. A view stores nothing: after the
    graph has changed, it shows the change.
    """

    node: fx.Node

    # Form of the node

    @property
    def is_input(self) -> bool:
        """Return True for an input of the graph."""
        return self.node.op == "placeholder"

    @property
    def is_constant(self) -> bool:
        """Return True for a parameter, a buffer or a constant of the module."""
        return self.node.op == "get_attr"

    @property
    def is_output(self) -> bool:
        """Return True for the node that returns the results."""
        return self.node.op == "output"

    @property
    def is_module(self) -> bool:
        """Return True for the call of a module."""
        return self.node.op == "call_module"

    @property
    def is_function(self) -> bool:
        """Return True for the call of an operator that is no module."""
        return self.node.op == "call_function"

    @property
    def kind(self) -> OperatorKind:
        """Return the operator's kind; `OperatorKind.FLOAT` for an operator without a row.

        A result that is taken out of several keeps the scale of their operator's input where that operator does: a part
        of a split does, a maximum beside its position is a tensor of its own.
        """
        if self.takes_result and self.inputs[0].kind not in TRANSPARENT:
            return K.FLOAT
        return GRAPH_ENDS.get(self.node.op) or self.row.kind

    @property
    def takes_result(self) -> bool:
        """Return True for the node that takes a result out of those of an operator with several."""
        return self.node.target is operator.getitem

    @property
    def row(self) -> Operator:
        """Return the operator's row in the table `halfeven.graph.operators.OPERATORS`."""
        if not self.is_module:
            return row_of(self.node.target)
        return self._kept_rows.get(self.path) or row_of_module(self._called_module())

    @property
    def is_kept(self) -> bool:
        """Return True for the call of a module whose own code stays Python."""
        return self.is_module and self.path in self._kept_rows

    @property
    def _kept_rows(self) -> dict[str, Operator]:
        kept: dict[str, Operator] = getattr(self.node.graph.owning_module, "kept_rows", {})
        return kept

    @property
    def module(self) -> Any:
        """Return the called module; None for any other node."""
        return self._called_module() if self.is_module else None

    def _called_module(self) -> nn.Module:
        owner = self.node.graph.owning_module
        assert owner is not None
        return owner.get_submodule(str(self.node.target))

    @property
    def function(self) -> Any:
        """Return the called overload, such as `torch.ops.aten.relu.default`; None for any other node."""
        return self.node.target if self.is_function else None

    # Names

    @property
    def name(self) -> str:
        """Return the operator's short name: "Conv2d", "relu", "add"."""
        if self.is_module:
            return type(self.module).__name__
        if is_operator(self.node.target):
            return short_name(self.node.target)
        return getattr(self.node.target, "__name__", str(self.node.target))

    @property
    def path(self) -> str:
        """Return the dotted path of the module or constant, or the input's name.

        For a function it is the path of the module whose code calls it, "" if that is not known.
        """
        if not self.is_function:
            return str(self.node.target)
        # From the model inwards: the last entry is the module whose own code was running.
        stack = list((self.node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]) if stack else ""

    @property
    def parent_path(self) -> str:
        """Return the path without its last part; "" at the top."""
        return self.path.rpartition(".")[0]

    @property
    def last_name(self) -> str:
        """Return the last part of the path: "weight" of "layer1.0.conv1.weight"."""
        return self.path.rpartition(".")[2]

    @property
    def tensor_name(self) -> str:
        """Return the name by which users know the result, without the number that makes it unique."""
        if "halfeven_name" in self.node.meta:
            return str(self.node.meta["halfeven_name"])
        if not self.is_function:
            return self.path
        return f"{self.path}.{self.name}" if self.path else self.name

    # Arguments and result

    def argument(self, name: str) -> Any:
        """Return the argument of an operator by the name that ATen's schema gives it, or its default.

        Raises:
            KeyError: the operator has no parameter of this name.
        """
        return self.arguments[name]

    @property
    def arguments(self) -> dict[str, Any]:
        """Return all arguments of an operator by the names of ATen's schema, defaults filled in."""
        # Defaults first, then what is given by position and by name.
        parameters = parameters_of(self.node.target)
        values = {p.name: p.default for p in parameters if p.has_default}
        values |= {p.name: value for p, value in zip(parameters, self.node.args, strict=False)}
        return values | dict(self.node.kwargs)

    @property
    def constant(self) -> Any:
        """Return the parameter, buffer or constant that a `get_attr` node reads.

        Raises:
            AttributeError: the node is of another form.
        """
        if not self.is_constant:
            raise AttributeError(f"{self.node} reads no constant")
        value: Any = self.node.graph.owning_module
        for part in self.path.split("."):
            value = getattr(value, part)
        return value

    @property
    def value(self) -> Any:
        """Return the recorded result: a tensor without data, a number, or a list of these; None if there is none."""
        return self.node.meta.get("val")

    @property
    def shape(self) -> tuple[Any, ...]:
        """Return the shape of the result, for a node that yields a single tensor; a free axis is a `torch.SymInt`."""
        return tuple(self.value.shape)

    @property
    def ndim(self) -> int:
        """Return the number of axes of the result, for a node that yields a single tensor."""
        return len(self.shape)

    @property
    def is_tensor(self) -> bool:
        """Return True if the result is a single tensor."""
        return isinstance(self.value, Tensor)

    @property
    def is_float_tensor(self) -> bool:
        """Return True if the result is a single floating-point tensor."""
        return isinstance(self.value, Tensor) and self.value.is_floating_point()

    @property
    def yields_floats(self) -> bool:
        """Return True if at least one result is a floating-point tensor."""
        results = pytree.tree_leaves(self.value)
        return any(isinstance(result, Tensor) and result.is_floating_point() for result in results)

    # Facts from the operator's row

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Return the bounds (low, high) that the operator clips its input to; None for an operator that does not clip.

        A bound may be infinite: ReLU clips to [0, inf].
        """
        given = self._given_bounds()
        if given is None or any(bound is not None and not isinstance(bound, int | float) for bound in given):
            return None
        low, high = given
        return -math.inf if low is None else float(low), math.inf if high is None else float(high)

    def _given_bounds(self) -> tuple[Any, Any] | None:
        rule = self.row.bounds if self.is_function else None
        return None if rule is None else rule(self.arguments)

    @property
    def is_non_negative(self) -> bool:
        """Return True if no value can be negative, judged by the operators that lead to it."""
        if (bounds := self._given_bounds()) is not None:
            return isinstance(bounds[0], int | float) and bounds[0] >= 0
        kind = self.kind
        if self.row.results[0] >= 0:
            return True
        if kind in TRANSPARENT or kind is K.AVERAGE:
            return self.inputs[0].is_non_negative
        if kind in (K.CONCAT, K.MULTIPLY) or (kind is K.ADD and not self.row.subtracts):
            numbers = [a for a in (*self.node.args, *self.node.kwargs.values()) if isinstance(a, int | float)]
            return all(operand.is_non_negative for operand in self.inputs) and all(number >= 0 for number in numbers)
        return False

    @property
    def has_kernel_rounding(self) -> bool:
        """Return True if the last bits of the result, computed in float, depend on the kernel's version."""
        return self.row.has_kernel_rounding

    @property
    def pads_zeros(self) -> bool:
        """Return True if this call may put zeros beside the values of its input."""
        rule = self.row.pads_zeros if self.is_function else None
        return rule is not None and rule(self.arguments)

    def factor_axis(self, axis: int) -> int | None:
        """Return the channels' axis after this call, if a positive factor per channel passes through it; else None.

        Args:
            axis: the channels' axis before the call.
        """
        rule = self.row.factor_axis if self.is_function else None
        return None if rule is None else rule(self._as_call(), axis)

    @property
    def passes_features(self) -> bool:
        """Return True if this call keeps the last axis and passes a factor and an offset per channel of it."""
        rule = self.row.passes_features
        return rule is not None and rule(self._as_call())

    def _as_call(self) -> Call:
        source = self.inputs[0].value if self.inputs else None
        arguments = self.arguments if is_operator(self.node.target) else {}
        return Call(arguments, tuple(getattr(source, "shape", ())), tuple(getattr(self.value, "shape", ())))

    # Neighbours

    @property
    def inputs(self) -> tuple["Op", ...]:
        """Return the nodes whose results the node reads, each once, in the order of its arguments."""
        return tuple(Op(node) for node in self.node.all_input_nodes)

    @property
    def readers(self) -> tuple["Op", ...]:
        """Return the nodes that read the result, in the order in which the links were made."""
        return tuple(Op(node) for node in self.node.users)

    @property
    def only_reader(self) -> "Op | None":
        """Return the node that reads the result, if a single node does; else None."""
        readers = self.readers
        return readers[0] if len(readers) == 1 else None


# Short forms of the most frequent look-ups


def kind_of(node: fx.Node) -> OperatorKind:
    """Return the operator kind of a node; `OperatorKind.FLOAT` for an operator without a row."""
    return Op(node).kind


def module_of(node: fx.Node) -> nn.Module:
    """Return the module that a node calls, for a node that calls a module."""
    module: nn.Module = Op(node).module
    return module


# Whole graphs


def operations(graph: fx.Graph) -> list[Op]:
    """Return views of all nodes of a graph, in its order; the graph may be changed during a loop over the list."""
    return [Op(node) for node in graph.nodes]


def nodes_after(node: fx.Node) -> set[fx.Node]:
    """Return the nodes that come after a node in its graph."""
    found: set[fx.Node] = set()
    current = node.next
    while current.op != "root":  # torch.fx keeps the nodes in a ring, which a node "root" closes
        found.add(current)
        current = current.next
    return found


def computes_products(graph: fx.Graph) -> bool:
    """Return True for a graph with an operator that a runtime may compute with integers: a layer or a product."""
    return any(op.kind in (*WEIGHTED, K.MATMUL) for op in operations(graph))


def module_calls(graph: fx.Graph) -> list[Op]:
    """Return views of the nodes that call modules, in the graph's order, a view for each call."""
    return [op for op in operations(graph) if op.is_module]


def replace_call(node: fx.Node, target: Any, args: Iterable[Any], kwargs: dict[str, Any] | None = None) -> None:
    """Make a node call another operator or module, in place; its readers and its recorded result stay.

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


def tensor_names(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the names by which users know the tensors of a graph, each with its node.

    A layer's output has the layer's path; a function's result has the path of the calling module and the operator's
    name, numbered where several are equal; an input has its own name. An operator that took the place of another keeps
    the name (`keep_tensor_name`).
    """
    names: dict[str, fx.Node] = {}
    for op in operations(graph):
        if op.kind is K.OUTPUT or op.is_constant:
            continue
        names[unique_name(op.tensor_name, names)] = op.node
    return names


def unique_name(name: str, taken: Container[str]) -> str:
    """Return a name that is not taken: with the first number behind it that makes it so."""
    unique = name
    number = 1
    while unique in taken:
        unique = f"{name}_{number}"
        number += 1
    return unique


def keep_tensor_name(node: fx.Node, name: str) -> None:
    """Fix the name of a node's tensor, which stays when another operator takes the node's place."""
    node.meta["halfeven_name"] = name
