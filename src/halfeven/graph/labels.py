"""Labels inside forward: `forward(inputs, labels=None)` that returns its loss when it gets labels.

The captured graph is that of the call without labels, which is deployed. The operators between its outputs and the loss
become a graph of their own, which runs only when labels are given and computes as the float model does.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import fx, nn

from halfeven.errors import CaptureError
from halfeven.graph.batches import Inputs, is_label
from halfeven.graph.equal_nodes import attribute_at, number_nodes
from halfeven.graph.torch_private import output_form, own_modules, pytree

LOSS = "halfeven_loss"
"""Name of the submodule of a captured model that computes its loss."""

OUTPUT, INPUT, BUFFER = "output", "input", "buffer"
"""Kinds of inputs of the loss: an output, an input or a buffer of the model."""

Source = tuple[str, Any]
"""Kind of an input, and its place among all outputs or inputs, or the buffer's name."""


def without_labels(model: nn.Module, inputs: Inputs) -> tuple[Inputs, tuple[str, ...]]:
    """Return the arguments without those that are labels, and the names of the labels among them.

    Positional arguments stay positional where no label stands before an input, and become keyword arguments elsewhere.
    """
    args, kwargs = inputs
    signature = inspect.signature(model.forward)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:  # the model's own call says what is wrong
        return inputs, ()
    labels = [name for name in given if is_label(signature.parameters[name])]
    names = list(given)[: len(args)]
    kept = {name: value for name, value in kwargs.items() if name not in labels}
    if entries_with_labels(model, inputs):
        # A label leaves a gap among the positional arguments. They become keyword arguments, all of them: a captured
        # graph takes either kind, and no mix.
        kept = {name: value for name, value in zip(names, args, strict=True) if name not in labels} | kept
        args = ()
    else:
        first = next((i for i, name in enumerate(names) if name in labels), len(args))
        args = args[:first]
    return (args, kept), tuple(name for name in labels if given[name] is not None)


def entries_with_labels(model: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Return the names of a model's positional arguments where a label stands before an input; else ()."""
    args, kwargs = inputs
    parameters = inspect.signature(model.forward).parameters
    names = list(inspect.signature(model.forward).bind(*args, **kwargs).arguments)[: len(args)]
    are_labels = [is_label(parameters[name]) for name in names]
    by_name = all(parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in names)
    return tuple(names) if by_name and are_labels != sorted(are_labels) else ()


class Loss(nn.Module):
    """The operators between a captured model's outputs and what it returns with labels.

    Args:
        graph: takes the `sources` in their order, and returns a list.
        sources: what each input of the graph is.
        form: the structure of what is returned.
        names: names of the model's inputs and labels, in the order of their places.
        labels: names of the labels.
    """

    def __init__(
        self, graph: fx.GraphModule, sources: list[Source], form: Any, names: tuple[str, ...], labels: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.graph = graph
        self.sources = sources
        self.form = form
        self.names = names
        self.labels = labels

    def forward(self, model: nn.Module, arguments: dict[str, Any], outputs: Any) -> Any:
        inputs = pytree.tree_leaves([arguments[name] for name in self.names])
        read: dict[str, Callable[[Any], Any]] = {
            INPUT: inputs.__getitem__,
            OUTPUT: pytree.tree_leaves(outputs).__getitem__,
            BUFFER: model.get_buffer,
        }
        values = [read[kind](place) for kind, place in self.sources]
        return pytree.tree_unflatten(list(self.graph(*values)), self.form)


def add_loss(
    captured: Any, original: nn.Module, plain: fx.GraphModule, full: fx.GraphModule, labels: tuple[str, ...]
) -> None:
    """Add the loss to a captured model, so that it takes labels too.

    Args:
        captured: the captured model.
        original: the model that it was captured from.
        plain: the exported model without labels.
        full: the exported model with labels.
        labels: names of the labels.

    Raises:
        CaptureError: the loss reads parameters, beyond the model's outputs.
    """
    copier = _Copier(original, plain, full)
    copier.graph.output([copier.copy(value) for value in _graph_results(full.graph)])
    copier.graph.lint()
    module = fx.GraphModule(copier.constants, copier.graph)
    names = tuple(inspect.signature(full.forward).parameters)
    captured.add_module(LOSS, Loss(module, list(copier.sources), output_form(full.graph), names, labels))
    captured.recompile()


def remove_loss(captured: Any) -> None:
    """Remove the loss of a captured model: a file takes no labels."""
    if own_modules(captured).pop(LOSS, None) is not None:
        captured.recompile()


def with_labels(model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a captured model, which refuses names that it does not know.

    In a model with a loss it takes labels too.
    """
    loss: Any = own_modules(model).get(LOSS)
    plain = inspect.signature(forward)
    names = [name for name in plain.parameters if name != "self"]
    if loss is None:
        return _checking_keywords(forward, names)
    signature = plain.replace(parameters=_parameters_with_labels(list(plain.parameters.values()), loss))

    @wraps(forward)
    def labelled(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        itself = arguments.pop("self")
        outputs = forward(itself, **{name: arguments[name] for name in names})
        found: Any = own_modules(itself)[LOSS]
        if all(arguments[name] is None for name in found.labels):
            return outputs
        return found(itself, arguments, outputs)

    labelled.__signature__ = signature  # type: ignore[attr-defined]
    return labelled


def _parameters_with_labels(plain: list[inspect.Parameter], loss: Loss) -> list[inspect.Parameter]:
    """Return the parameters of a captured model's forward with its labels in the places of the float model's."""
    inputs = {parameter.name: parameter for parameter in plain}
    first = next((place for place, name in enumerate(loss.names) if name in loss.labels), 0)
    found = [parameter for parameter in plain if parameter.name not in loss.names[first:]]
    # Labels may be left out, so that Python wants a default of all that follow. An input that is None then is refused.
    for name in loss.names[first:]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        found.append(inputs.get(name, inspect.Parameter(name, kind)).replace(default=None))
    return found


def _checking_keywords(forward: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    @wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        unknown = [name for name in kwargs if name not in names]
        unknown += [f"a further positional input ({type(value).__name__})" for value in args[len(names) :]]
        if unknown:
            raise CaptureError(
                f"The model was called with {', '.join(unknown)}, and the example it was prepared with has no such "
                f"inputs: its graph takes only {', '.join(names)}. Prepare it with an example that has all inputs of "
                "the call; with labels in the example, it returns the loss as the float model does."
            )
        return forward(self, *args, **kwargs)

    return checked


def _graph_results(graph: fx.Graph) -> list[Any]:
    (output,) = [node for node in graph.nodes if node.op == "output"]
    return list(output.args[0])


class _Copier:
    """Copies the operators of a loss into a graph of their own, back to the outputs of the model without labels."""

    def __init__(self, original: nn.Module, plain: fx.GraphModule, full: fx.GraphModule) -> None:
        self.full = full
        self.parameters = {name for name, _ in original.named_parameters(remove_duplicate=False)}
        self.buffers = {name for name, _ in original.named_buffers(remove_duplicate=False)}
        self.graph = fx.Graph()
        self.constants = nn.Module()
        self.sources: dict[Source, fx.Node] = {}
        self.copies: dict[fx.Node, Any] = {}
        numbers: dict[Any, int] = {}
        # One table for both graphs: a node of the full graph with the number of an output computes that output.
        own = self.parameters | self.buffers
        known = number_nodes(plain, numbers, own)
        self.numbers = number_nodes(full, numbers, own)
        results = _graph_results(plain.graph)
        self.outputs = {known[node]: place for place, node in enumerate(results) if isinstance(node, fx.Node)}
        inputs = [node for node in full.graph.nodes if node.op == "placeholder"]
        self.places = {node: place for place, node in enumerate(inputs)}

    def copy(self, value: Any) -> Any:
        """Return the copy of a node, or of a structure of nodes."""
        return fx.node.map_arg(value, self._copy_of)

    def _copy_of(self, node: fx.Node) -> fx.Node:
        if node not in self.copies:
            self.copies[node] = self._make_copy(node)
        result: fx.Node = self.copies[node]
        return result

    def _make_copy(self, node: fx.Node) -> fx.Node:
        place = self.outputs.get(self.numbers[node])
        if place is not None:
            return self._input_node((OUTPUT, place))
        if node.op == "placeholder":
            return self._input_node((INPUT, self.places[node]))
        if node.op == "get_attr":
            return self._copy_constant(str(node.target))
        return self.graph.create_node(node.op, node.target, self.copy(node.args), self.copy(node.kwargs))

    def _copy_constant(self, path: str) -> fx.Node:
        if path in self.parameters:
            raise CaptureError(
                f"The loss inside of the model's forward reads the parameter {path}, beyond what the model returns "
                "without labels, so the loss of the quantized model cannot be computed from its outputs. Give an "
                "example without labels, and compute the loss outside of the model."
            )
        if path in self.buffers:
            return self._input_node((BUFFER, path))
        name = path.replace(".", "_")
        self.constants.register_buffer(name, attribute_at(self.full, path).detach().clone(), persistent=False)
        return self.graph.get_attr(name)

    def _input_node(self, source: Source) -> fx.Node:
        if source not in self.sources:
            # Inputs of a graph come before all other nodes, and in the order of `sources`.
            before = next(iter(self.graph.nodes), None) if not self.sources else list(self.sources.values())[-1].next
            with self.graph.inserting_before(before):
                self.sources[source] = self.graph.placeholder(f"value_{len(self.sources)}")
        return self.sources[source]
