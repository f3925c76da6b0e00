"""Other outputs in training than in eval mode, in one graph: a head that returns raw maps, and boxes in eval mode.

The captured graph is that of eval mode, which is deployed. Taps mark the tensors in it that the outputs of training are
made of; the operators between the two are a graph of their own, which computes as the float model does.
"""

import copy
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, fx, nn

from halfeven.errors import CaptureError
from halfeven.graph.equal_nodes import attribute_at, number_nodes
from halfeven.graph.torch_private import call_form, output_form, own_modules, pytree, with_call_form
from halfeven.graph.training_tap import TrainingTap

TRAINING_OUTPUTS = "halfeven_training"
"""Name of the submodule of a captured model that makes its outputs in training."""


class TrainingOutputsError(CaptureError):
    """The outputs of training cannot be made of tensors in the graph of eval mode."""


class TrainingOutputs(nn.Module):
    """The operators between the tapped tensors of a captured model and what it returns in training.

    Args:
        graph: takes the tapped tensors in their order, and returns a list.
        form: the structure of what is returned.
        taps: the number of tapped tensors.
    """

    def __init__(self, graph: fx.GraphModule, form: Any, taps: int) -> None:
        super().__init__()
        self.graph = graph
        self.form = form
        self.taps = nn.ModuleList(TrainingTap() for _ in range(taps))

    def forward(self, tapped: Sequence[Tensor]) -> Any:
        return pytree.tree_unflatten(list(self.graph(*tapped)), self.form)


@contextmanager
def own_flags_on(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Put modules in training mode within the context, but none of their children."""
    modules = [model.get_submodule(name) for name in names]
    for module in modules:
        module.training = True
    try:
        yield
    finally:
        for module in modules:
            module.training = False


def tap_training_outputs(original: nn.Module, evaluated: fx.GraphModule, trained: fx.GraphModule) -> TrainingOutputs:
    """Tap the tensors in an exported graph, in place, that the outputs of training are made of, and return the rest.

    Args:
        original: the model that was exported.
        evaluated: its graph in eval mode.
        trained: its graph with the training outputs.

    Raises:
        TrainingOutputsError: a parameter or a buffer has a part in them beyond the graph of eval mode.
    """
    copier = _Copier(original, evaluated, trained)
    (output,) = [node for node in trained.graph.nodes if node.op == "output"]
    results = [copier.copied(value) for value in output.args[0]]
    copier.graph.output(results)
    copier.graph.lint()
    module = fx.GraphModule(copier.constants, copier.graph)
    for number, source in enumerate(copier.tapped):
        _tap(source, f"{TRAINING_OUTPUTS}.taps.{number}")
    return TrainingOutputs(module, output_form(trained.graph), len(copier.tapped))


def _tap(source: fx.Node, path: str) -> None:
    after = source
    while after.next.op == "placeholder":  # calls come after all inputs of a graph
        after = after.next
    with source.graph.inserting_after(after):
        tap = source.graph.create_node("call_module", path, (source,))
    tap.meta = dict(source.meta)


def by_mode(evaluated: Callable[..., Any], trained: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a captured model with training outputs.

    Args:
        evaluated: computes the outputs of eval mode.
        trained: computes the tapped tensors.
    """

    @wraps(evaluated)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return evaluated(self, *args, **kwargs)
        return own_modules(self)[TRAINING_OUTPUTS](trained(self, *args, **kwargs))  # type: ignore[misc]

    return forward


def has_training_outputs(module: nn.Module) -> bool:
    """Return True for a captured model that returns something else in training."""
    # While torch.fx copies a graph, a plain module stands there.
    return isinstance(own_modules(module).get(TRAINING_OUTPUTS), TrainingOutputs)


def graph_in_training(module: nn.Module, graph: fx.Graph) -> fx.Graph:
    """Return a copy of a captured model's graph that returns the tapped tensors, without what only others need."""
    result = copy.deepcopy(graph)
    result.owning_module = module  # type: ignore[assignment]
    taps = _taps(module, result)
    (output,) = [node for node in result.nodes if node.op == "output"]
    output.args = ([node.args[0] for node in taps],)
    for node in taps:
        result.erase_node(node)
    with_call_form(result, (*call_form(graph)[:-1], None))  # the results as they are, in a list
    result.eliminate_dead_code()
    return result


def remove_training_outputs(module: Any) -> None:
    """Remove the training outputs of a captured model, in place: a file has those of eval mode."""
    if not has_training_outputs(module):
        return
    for node in _taps(module, module.graph):
        module.graph.erase_node(node)
    del own_modules(module)[TRAINING_OUTPUTS]
    module.graph.eliminate_dead_code()
    module.recompile()


def _taps(module: nn.Module, graph: fx.Graph) -> list[fx.Node]:
    """Return the calls of a graph's taps in the order of their numbers."""
    found = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    count = len(own_modules(module)[TRAINING_OUTPUTS].taps)  # type: ignore[union-attr,arg-type]
    return [found[f"{TRAINING_OUTPUTS}.taps.{number}"] for number in range(count)]


def _weights(graph: fx.Graph, parameters: Container[str]) -> set[fx.Node]:
    """Return the parameters that a graph reads, and what it computes of them alone, such as a normalized weight."""
    found: set[fx.Node] = set()
    of_inputs: set[fx.Node] = set()
    for node in graph.nodes:
        sources = set(node.all_input_nodes)
        if node.op == "placeholder" or sources & of_inputs:
            of_inputs.add(node)
        elif (node.op == "get_attr" and node.target in parameters) or sources & found:
            found.add(node)
    return found


class _Copier:
    """Copies the operators of training outputs into a graph of their own, back to tensors of the graph of eval mode."""

    def __init__(self, original: nn.Module, evaluated: fx.GraphModule, trained: fx.GraphModule) -> None:
        parameters = {name for name, _ in original.named_parameters(remove_duplicate=False)}
        self.weights = _weights(evaluated.graph, parameters)
        self.own = parameters | {name for name, _ in original.named_buffers(remove_duplicate=False)}
        self.trained = trained
        self.graph = fx.Graph()
        self.constants = nn.Module()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.tapped: list[fx.Node] = []
        numbers: dict[Any, int] = {}
        # One table for both graphs. Of equal nodes in one graph the last stands for all.
        known = {number: node for node, number in number_nodes(evaluated, numbers, self.own).items()}
        self.equal = {
            node: known[number]
            for node, number in number_nodes(trained, numbers, self.own).items()
            if number in known and isinstance(node.meta.get("val"), Tensor)
        }
        self.inputs: dict[fx.Node, fx.Node] = {}

    def copied(self, value: Any) -> Any:
        """Return the copy of a node, or of a structure of nodes."""
        return fx.node.map_arg(value, self._copy_of)

    def _copy_of(self, node: fx.Node) -> fx.Node:
        if node not in self.copies:
            source = self.equal.get(node)
            if source is not None:
                self._check_not_quantized(source)
            self.copies[node] = self._copy(node) if source is None else self._input_for(source)
        return self.copies[node]

    def _check_not_quantized(self, source: fx.Node) -> None:
        """Refuse the parameter of a layer of eval mode: in the other graph it would be trained without quantization."""
        if source in self.weights and source.users:
            raise TrainingOutputsError(
                f"the outputs of training compute with {source.name}, which eval mode reads in another place"
            )

    def _copy(self, node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            return self._copied_constant(str(node.target))
        if node.op != "call_function":
            raise TrainingOutputsError(f"the outputs of training need {node.target}, which eval mode does not read")
        return self.graph.create_node(node.op, node.target, self.copied(node.args), self.copied(node.kwargs))

    def _copied_constant(self, path: str) -> fx.Node:
        if path in self.own:
            raise TrainingOutputsError(f"the outputs of training read {path}, which those of eval mode do not read")
        name = path.replace(".", "_")
        self.constants.register_buffer(name, attribute_at(self.trained, path).detach().clone(), persistent=False)
        return self.graph.get_attr(name)

    def _input_for(self, source: fx.Node) -> fx.Node:
        if source not in self.inputs:
            # Inputs of a graph come before all other nodes, and in the order of the taps.
            before = self.inputs[self.tapped[-1]].next if self.tapped else next(iter(self.graph.nodes), None)
            with self.graph.inserting_before(before):
                self.inputs[source] = self.graph.placeholder(f"value_{len(self.tapped)}")
            self.tapped.append(source)
        return self.inputs[source]
