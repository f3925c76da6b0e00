"""Names of inputs, outputs and axes in an ONNX graph, and facts about it."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from halfeven.deployment.file_interface import FLOAT_PRECISION, FileInterface, FloatPrecision

FACTS = "halfeven."
"""Beginning of the names of facts in the metadata of a file."""


def write_interface(model: Any, interface: FileInterface, tensors: set[str]) -> None:
    """Give an `onnx_ir.Model` the names and facts of a file's interface, in place.

    Args:
        model: the model, its quantized tensors named.
        interface: the names and facts.
        tensors: names of the quantized tensors, which they keep.
    """
    name_ends(model.graph, interface, tensors)
    name_axes(model.graph, interface.symbols)
    _write_facts(model, interface.metadata)


def name_ends(graph: Any, interface: FileInterface, tensors: set[str]) -> None:
    """Name the inputs and outputs of an `onnx_ir.Graph` as a file's interface says, in place.

    Args:
        graph: the graph, its quantized tensors named.
        interface: the names.
        tensors: names of the quantized tensors, which they keep: an output that is such a tensor is a copy of it.
    """
    wanted = {*interface.inputs, *interface.outputs}
    for value in _values(graph):
        if value.name in wanted:
            # A tensor inside that has a wanted name already gives it up.
            value.name = f"{value.name}.inside"
    for value, name in zip(graph.inputs, interface.inputs, strict=True):
        value.name = name
    for index, name in enumerate(interface.outputs):
        value = graph.outputs[index]
        # An output that is an input, a quantized tensor or another output shares a tensor that has a name: a copy takes
        # this one.
        if value.producer() is None or value.name in tensors | wanted:
            value = graph.outputs[index] = _copied(graph, value)
        value.name = name


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from tuple(graph.initializers.values())
    for node in graph:
        yield from node.outputs


def _copied(graph: Any, value: Any) -> Any:
    """Return the result of an Identity, which runtimes leave out."""
    import onnx_ir

    node = onnx_ir.node("Identity", [value])
    graph.append(node)
    result = node.outputs[0]
    result.type = value.type
    result.shape = value.shape
    return result


def name_axes(graph: Any, symbols: Mapping[str, str]) -> None:
    """Name the free axes of all tensors: the exporter names them by its symbols, "s77"."""
    import onnx_ir

    for value in {*_values(graph), *graph.outputs}:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([_named(size, symbols) for size in value.shape])


def _named(size: Any, symbols: Mapping[str, str]) -> Any:
    if isinstance(size, int) or size.value is None:
        return size
    # A size may be an expression of symbols, such as "2*s77".
    return re.sub(r"\w+", lambda word: symbols.get(word[0], word[0]), str(size.value))


def _write_facts(model: Any, metadata: Mapping[str, str]) -> None:
    """Write facts into an `onnx_ir.Model`, each under `FACTS` and its name."""
    model.producer_name = "halfeven"
    model.producer_version = metadata.get("version", "")
    model.metadata_props.update({f"{FACTS}{name}": value for name, value in metadata.items()})


def facts_in(model: Any) -> dict[str, str]:
    """Return the facts that an `onnx.ModelProto` has about itself, by name."""
    return {fact.key.removeprefix(FACTS): fact.value for fact in model.metadata_props if fact.key.startswith(FACTS)}


def float_precision_in(model: Any) -> FloatPrecision:
    """Return the precision that an `onnx.ModelProto` was written for."""
    return "runtime" if facts_in(model).get(FLOAT_PRECISION) == "runtime" else "f32"
