"""Keep a module's own Python code in a captured graph, because training runs something in it that the graph lacks.

Within `kept_markers` each output of such a module is marked while `torch.export` traces the model; `restore_kept` then
puts a call of the module in the place of the operators that were traced inside of it.
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfeven.errors import CaptureError
from halfeven.graph.operators import WEIGHTED, Operator, OperatorKind, row_of_module
from halfeven.graph.torch_private import pytree
from halfeven.graph.view import Op


@dataclass(frozen=True)
class KeptInPython:
    """A module whose own code stays Python: its name ("" is the model itself), and what training does in it."""

    name: str
    reason: str
    whole: bool = False
    """The captured graph calls the module with all that is inside of it. Otherwise its forward is Python, as are those
    that call it, and its children are captured by themselves."""
    in_graph: bool = False
    """Its own code does not stay: the captured graph returns in training what the module returns there."""

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'}: {self.reason}"


@dataclass(frozen=True)
class _Call:
    """One call of a kept module while the model is traced."""

    name: str
    arguments: tuple[Any, ...]
    """The arguments without their nesting, with None for each tensor."""
    tensors: tuple[bool, ...]
    """Which arguments are tensors."""
    nesting: Any
    results: Any
    """The structure of the results."""


Calls = dict[str, _Call]


@torch.library.custom_op("halfeven::kept", mutates_args=())
def _mark_kept(x: Tensor, inputs: Sequence[Tensor], call: str, index: int) -> Tensor:
    return x.clone()


@_mark_kept.register_fake
def _(x: Tensor, inputs: Sequence[Tensor], call: str, index: int) -> Tensor:
    return torch.empty_like(x)


def can_be_whole(module: nn.Module) -> bool:
    """Return True for a module without layers that could be quantized."""
    return all(row_of_module(part).kind not in WEIGHTED for part in module.modules())


@contextmanager
def kept_markers(model: nn.Module, names: Sequence[str]) -> Iterator[Calls]:
    """Mark the outputs of the named modules within the context, and yield the calls that are traced."""
    calls: Calls = {}
    modules = [(name, model.get_submodule(name)) for name in names]
    for name, module in modules:
        # An attribute of the instance hides the class's method; `del` in the end makes the method visible again.
        module.forward = _marking_forward(name, module.forward, calls)
    try:
        yield calls
    finally:
        for _, module in modules:
            del module.forward


def _marking_forward(name: str, forward: Any, calls: Calls) -> Any:
    def marked(*args: Any, **kwargs: Any) -> Any:
        given, nesting = pytree.tree_flatten((args, kwargs))
        results, outputs = pytree.tree_flatten(forward(*args, **kwargs))
        tensors = tuple(isinstance(x, Tensor) for x in given)
        _check_constants(name, [x for x, tensor in zip(given, tensors, strict=True) if not tensor])
        call = f"{name} {len(calls)}"
        constants = tuple(None if tensor else x for x, tensor in zip(given, tensors, strict=True))
        calls[call] = _Call(name, constants, tensors, nesting, outputs)
        # A mark reads the inputs too, although it returns a result: so the graph keeps them for the call.
        inputs = [x for x in given if isinstance(x, Tensor)]
        marks = [
            torch.ops.halfeven.kept(x, inputs, call, index) if isinstance(x, Tensor) else x
            for index, x in enumerate(results)
        ]
        return pytree.tree_unflatten(marks, outputs)

    return marked


def _check_constants(name: str, values: list[Any]) -> None:
    if any(not isinstance(value, int | float | str | None) for value in values):
        raise CaptureError(f"{name} is called with an argument that is no tensor and no constant")


def restore_kept(graph: fx.Graph, original: nn.Module, calls: Calls) -> dict[str, Operator]:
    """Replace the operators that were traced inside of kept modules by calls of the modules, in place.

    Returns:
        The facts of each kept module, by its path: those of an identity where eval mode returns the input.
    """
    marks: dict[str, list[fx.Node]] = {}
    rows: dict[str, Operator] = {}
    for node in list(graph.nodes):
        if node.target is torch.ops.halfeven.kept.default:
            marks.setdefault(str(node.args[2]), []).append(node)
    for name, nodes in marks.items():
        call = calls[name]
        result, inputs = (Op(nodes[0]).argument(argument) for argument in ("x", "inputs"))
        # In eval mode, which is traced, it returns its input: quantized readers may then look through it.
        identity = len(nodes) == 1 and call.results.is_leaf() and result is next(iter(inputs), None)
        kind = OperatorKind.IDENTITY if identity else OperatorKind.FLOAT
        # A module that returns its input in some calls alone is no identity.
        if call.name in rows and rows[call.name].kind is not kind:
            kind = OperatorKind.FLOAT
        rows[call.name] = Operator(target=type(original.get_submodule(call.name)), kind=kind)
        _replace_by_call(graph, call, nodes)
    for node in reversed(list(graph.nodes)):  # not eliminate_dead_code, which looks the called modules up
        if node.op in ("call_function", "get_attr") and not node.users and not node.is_impure():
            graph.erase_node(node)
    return rows


def _replace_by_call(graph: fx.Graph, call: _Call, marks: list[fx.Node]) -> None:
    first = marks[0]
    tensors = iter(first.args[1])  # type: ignore[arg-type]
    flat = [next(tensors) if tensor else x for x, tensor in zip(call.arguments, call.tensors, strict=True)]
    args, kwargs = pytree.tree_unflatten(flat, call.nesting)
    with graph.inserting_before(first):
        called = graph.create_node("call_module", call.name, tuple(args), dict(kwargs))
        called.meta = {"nn_module_stack": first.meta.get("nn_module_stack")}
        paths = _result_paths(call.results)
        # The module returns a single tensor: the call itself is the result, with what was recorded of it.
        if paths == [()]:
            called.meta = dict(first.meta)
        for mark in marks:
            result = called
            for key in paths[int(mark.args[3])]:  # type: ignore[arg-type]
                result = graph.call_function(operator.getitem, (result, key))
            if result is not called:
                result.meta = dict(mark.meta)
            mark.replace_all_uses_with(result)
    for mark in marks:
        graph.erase_node(mark)


def _result_paths(results: Any) -> list[tuple[Any, ...]]:
    """Return the keys that lead to each result, in order."""
    numbered = pytree.tree_unflatten(list(range(results.num_leaves)), results)
    found = []
    for path, _ in pytree.tree_flatten_with_path(numbered)[0]:
        if any(not isinstance(key, pytree.SequenceKey | pytree.MappingKey) for key in path):
            raise CaptureError("a module that is kept in Python returns neither tensors nor tuples, lists or dicts")
        keys: list[Any] = list(path)
        found.append(tuple(key.idx if isinstance(key, pytree.SequenceKey) else key.key for key in keys))
    return found


def relative_to(name: str, kept: Mapping[str, KeptInPython]) -> list[str]:
    """Return the names, inside of a module, of the modules below it that are kept whole."""
    prefix = f"{name}." if name else ""
    return [path.removeprefix(prefix) for path, k in kept.items() if k.whole and path.startswith(prefix) and path]


def returning_others(name: str, kept: Mapping[str, KeptInPython]) -> list[str]:
    """Return the names, inside of a module, of the modules whose other outputs in training the graph returns."""
    prefix = f"{name}." if name else ""
    inside = [path for path, k in kept.items() if k.in_graph and (path == name or path.startswith(prefix))]
    return ["" if path == name else path.removeprefix(prefix) for path in inside]
