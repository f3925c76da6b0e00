"""The deployed model as an ATen program, traced on the example that it was prepared with."""

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import ConstantArgument

from halfeven.errors import ExportError
from halfeven.graph.batches import Inputs, argument_names
from halfeven.graph.dynamic_shapes import nested_shapes
from halfeven.graph.export_module import quiet
from halfeven.graph.fixed_axes import fixed_axes
from halfeven.graph.inline import without_fast_path
from halfeven.graph.model_inputs import BATCH
from halfeven.graph.recurrences import WholeRecurrences, restore_recurrences
from halfeven.graph.torch_private import pytree, untracked
from halfeven.graph.view import Op, record_value
from halfeven.placement.insertion import recorded_example


def example_of(qmodel: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the example input that a quantized model was prepared with, on the CPU.

    Raises:
        ExportError: the model carries none.
    """
    example = recorded_example(qmodel)
    if example is None:
        raise ExportError(
            "This model carries no example input, so it cannot be traced. Export what halfeven.prepare or "
            "halfeven.load returned."
        )
    return example


def exported_program(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], free: Sequence[Sequence[int]] | None = None
) -> torch.export.ExportedProgram:
    """Return a model as an ATen program in which axes of its inputs are free, except where their size is 1.

    Args:
        model: the model.
        args: positional arguments.
        kwargs: keyword arguments.
        free: the free axes of each leaf; None: the first of each tensor.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    axes = [(0,)] * len(leaves) if free is None else free
    shapes = [
        {axis: torch.export.Dim.AUTO for axis in own if axis < x.ndim and x.shape[axis] != 1} or None
        if isinstance(x, Tensor)
        else None
        for x, own in zip(leaves, axes, strict=True)
    ]
    return _export_program(model, (args, kwargs), shapes)


def program_of(model: nn.Module, example: Inputs, described: Inputs) -> torch.export.ExportedProgram:
    """Return a deployed model as an ATen program in which the axes are free that are free in the quantized model.

    Args:
        model: the deployed model.
        example: (positional, keyword) arguments.
        described: the same with a `ModelInput` in the place of each tensor, as `recorded_inputs` returns them.

    Raises:
        ExportError: the size of a free axis would be a constant in the file.
    """
    leaves = pytree.tree_leaves(described)
    dim = torch.export.Dim
    shapes = [
        {axis: dim.AUTO if label == BATCH else dim.DYNAMIC for axis, label in known.free.items()} if known else None
        for known in leaves
    ]
    try:
        return _export_program(model, example, shapes)
    except Exception as error:
        if fixed := fixed_axes(error, described):
            raise ExportError(
                f"The file would have a fixed size where the model has a free one: {'; '.join(fixed)}. So it could not "
                "be run at other sizes. Leave the axis out of dynamic_shapes."
            ) from error
        raise


def _export_program(model: nn.Module, example: Inputs, shapes: Sequence[Any]) -> torch.export.ExportedProgram:
    args, kwargs = example
    # What is left in Python may hold attention of torch's.
    with quiet(), without_fast_path(), WholeRecurrences():
        program = torch.export.export(
            model,
            args,
            kwargs,
            dynamic_shapes=_shapes_by_parameter(model, nested_shapes(example, shapes)),
            strict=False,
        )
    restore_recurrences(program.graph)
    _write_out_floor_divisions(program.graph)
    _leave_out_constants(program)
    return untracked(program)


def _shapes_by_parameter(model: nn.Module, shapes: Inputs) -> Any:
    """Return the shapes of all arguments in one tree: in their order, or by parameter where some have keywords."""
    args, kwargs = shapes
    signature = inspect.signature(model.forward)
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        return dict(signature.bind(*args, **kwargs).arguments)
    return dict(zip(argument_names(model, len(args)), args, strict=True)) | kwargs if kwargs else args


def _write_out_floor_divisions(graph: fx.Graph) -> None:
    """Write a // b as (a - a % b) / b where a size or offset may be negative, as in -(-n // 4): files round to zero."""
    for node in graph.find_nodes(op="call_function", target=operator.floordiv):
        size, divisor = node.args
        if _is_never_negative(size):
            continue
        with graph.inserting_before(node):
            remainder = graph.call_function(operator.mod, (size, divisor))
            record_value(remainder, operator.mod(*(Op(x).value if isinstance(x, fx.Node) else x for x in node.args)))
            multiple = graph.call_function(operator.sub, (size, remainder))
            record_value(multiple, Op(node).value * (Op(divisor).value if isinstance(divisor, fx.Node) else divisor))
        node.args = (multiple, divisor)


def _is_never_negative(size: Any) -> bool:
    """Return True for a size, and for what is computed of sizes without a subtraction."""
    if not isinstance(size, fx.Node):
        return isinstance(size, int | float) and size >= 0
    if size.target is operator.mod:
        return _is_never_negative(size.args[1])
    if size.target in (operator.add, operator.mul, operator.floordiv):
        return all(map(_is_never_negative, size.args))
    return size.target is torch.ops.aten.sym_size.int


def _leave_out_constants(program: torch.export.ExportedProgram) -> None:
    """Put None in the place of outputs that are numbers, sizes or texts: files have none, and converters fail."""
    output = program.graph.output_node()
    values = list(output.args[0])
    output.args = (tuple(value if _is_tensor(value) else None for value in values),)
    for value, spec in zip(values, program.graph_signature.output_specs, strict=True):
        if not _is_tensor(value):
            spec.arg = ConstantArgument(spec.arg.name if hasattr(spec.arg, "name") else "", None)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)
