"""ONNX: QuantizeLinear and DequantizeLinear at opset 19, weights as int8 initializers."""

import math
import operator
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from halfeven.deployment.deployed import Deployed
from halfeven.deployment.quantize_op import PER_TENSOR, ExportedQuantizer
from halfeven.errors import ExportError
from halfeven.files import write_atomically
from halfeven.graph.model_inputs import constant_size
from halfeven.graph.recurrences import CELLS, has_free_steps, has_projection, refuse_recurrence
from halfeven.graph.view import Op, operations, record_value
from halfeven.runtimes.onnx import external_data
from halfeven.runtimes.onnx.interface import write_interface
from halfeven.runtimes.onnx.rewrite import four_bits, name_and_fold

OPSET = 19
"""The oldest opset with all that 8 bits need; 21 and later trip ONNX Runtime on signed activations (its issue
25526)."""

FOUR_BITS_OPSET = 21
"""The oldest opset with 4-bit integers, for weights alone: no activation is quantized there."""

WHOLE_RANGES = ((0, 255), (-128, 127), (-127, 127), (-7, 7))
"""Grids whose integers need no clip: QuantizeLinear saturates, and the narrow grids are those of weights, which lie on
them."""


aten = torch.ops.aten
ADAPTIVE_POOLS = (
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    *(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
)

PLAIN_CELLS = (CELLS["rnn_tanh"], CELLS["rnn_relu"])

Translations = Mapping[Callable[..., Any], Callable[..., Any]]
"""Operator -> the function that writes it as operators of ONNX."""


def _translate_gelu(x: Any, approximate: str = "none") -> Any:
    """Translate a GELU to the order of operators that ONNX Runtime makes a single kernel of."""
    from onnxscript import opset19 as op

    half = op.Mul(x, 0.5)
    if approximate == "tanh":
        # x + 0.044715 x^3 (Hendrycks and Gimpel, arXiv:1606.08415, section 2).
        cubic = op.Add(x, op.Mul(op.Pow(x, 3.0), 0.044715))
        return op.Mul(half, op.Add(op.Tanh(op.Mul(cubic, math.sqrt(2 / math.pi))), 1.0))
    return op.Mul(half, op.Add(op.Erf(op.Div(x, math.sqrt(2))), 1.0))


GELU: Translations = {torch.ops.aten.gelu.default: _translate_gelu}


def write(program: torch.export.ExportedProgram, deployed: Deployed, path: Path) -> None:
    """Write the program of a deployed model as an ONNX file with a free batch size.

    The tensors of a model beyond 2 GB lie in a file beside it.
    """
    write_model(named_model(program, deployed), path)


def named_model(program: torch.export.ExportedProgram, deployed: Deployed, translations: Translations = GELU) -> Any:
    """Return the program of a deployed model as an `onnx_ir.Model`, with its names and its integers.

    `translations` are those of a runtime's own operators.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = translated(program, deployed.quantizers, translations)
    name_and_fold(model.graph, deployed)
    RemoveUnusedNodesPass()(model)
    model.metadata_props.clear()  # the tracer's notes
    if deployed.interface is not None:
        write_interface(model, deployed.interface, {quantizer.name for quantizer in deployed.quantizers})
    return model


def write_model(model: Any, path: Path) -> None:
    """Check an `onnx_ir.Model` and write it, whole or not at all."""
    import onnx

    if external_data.needed(model):
        external_data.write(model, path, lambda whole: _save_checked(_model_proto(model), whole))
        return
    proto = _model_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    write_atomically(path, lambda partial: onnx.save(proto, partial, format="protobuf"))


def _save_checked(proto: Any, path: Path) -> None:
    import onnx

    onnx.save(proto, path, format="protobuf")
    onnx.checker.check_model(str(path), full_check=True)  # by its path, since the tensors lie beside it


def _model_proto(model: Any) -> Any:
    """Return a model as an `onnx.ModelProto` without the tracer's notes and shapes."""
    import onnx_ir

    proto = onnx_ir.to_proto(model)
    for described in (*proto.graph.node, *proto.graph.initializer, *proto.graph.value_info, proto.graph):
        del described.metadata_props[:]  # the tracer's notes, a quarter of a small file
    _describe_alone(proto.graph, _skip_connections(proto.graph))
    return proto


def _skip_connections(graph: Any) -> set[str]:
    """Return the two tensors of each sum that a normalization reads.

    ONNX Runtime computes sum and normalization in one kernel where it knows the shapes, which it cannot infer behind a
    reshape.
    """
    makers = {output: node for node in graph.node for output in node.output}
    sums = [makers.get(node.input[0]) for node in graph.node if node.op_type == "LayerNormalization"]
    return {name for node in sums if node is not None and node.op_type == "Add" for name in node.input}


def _describe_alone(graph: Any, names: set[str]) -> None:
    """Leave the shapes of the named tensors in the file, and drop all other shapes."""
    kept = [described for described in graph.value_info if described.name in names]
    del graph.value_info[:]
    graph.value_info.extend(kept)


def translated(
    program: torch.export.ExportedProgram, quantizers: list[ExportedQuantizer], translations: Translations
) -> Any:
    """Return a program as an `onnx_ir.Model`, operator by operator.

    Args:
        program: the program.
        quantizers: those whose operators it has.
        translations: of operators that a runtime has a form of its own for.
    """
    _refuse_pools_of_free_sizes(program.graph)
    _refuse_recurrences(program.graph)
    _refuse_bags(program.graph)
    _write_out_rolls(program.graph)
    weights_alone = bool(quantizers) and all(quantizer.weight for quantizer in quantizers)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=FOUR_BITS_OPSET if any(map(four_bits, quantizers)) else OPSET,
        custom_translation_table={
            torch.ops.halfeven.fake_quantize.default: _fake_quantize_translation([q.signed for q in quantizers]),
            torch.ops.halfeven.global_average_pool.default: _translate_pool,
            torch.ops.halfeven.branch_of_sum.default: _translate_branch,
            round: _translate_round,
            **translations,
            **({torch.ops.aten.linear.default: _translate_linear} if weights_alone else {}),
        },
        optimize=False,
        verbose=False,
    )
    assert exported is not None
    return exported.model


def _refuse_pools_of_free_sizes(graph: fx.Graph) -> None:
    """Refuse adaptive pools to several positions of an axis whose size is free.

    ONNX has no operator for them: the translation would keep the windows of the example's size.

    Raises:
        ExportError: there is such a pool.
    """
    for op in operations(graph):
        if op.function not in ADAPTIVE_POOLS:
            continue
        positions = op.argument("output_size")
        sizes = op.inputs[0].shape[-len(positions) :]
        if any(wanted != 1 and constant_size(size) is None for wanted, size in zip(positions, sizes, strict=True)):
            raise ExportError(
                f"A pool to {' x '.join(map(str, positions))} positions ({op.node.name}) reads an axis whose size is "
                "free, and ONNX has no operator for it: the file would keep the windows of the example's size, and "
                "its results would be wrong at other sizes. Leave the axis out of dynamic_shapes, pool to one position "
                "or over windows of a fixed size, or deploy for OpenVINO as .xml."
            )


def _refuse_recurrences(graph: fx.Graph) -> None:
    """Refuse recurrent layers that the exporter would write otherwise than the model has them, without a word.

    It leaves projections out, and writes an RNN step by step, for the example's number of steps.

    Raises:
        ExportError: there is such a layer.
    """
    for node in graph.nodes:
        cells = node.target in CELLS.values()
        if cells and (has_projection(node) or (node.target in PLAIN_CELLS and has_free_steps(node))):
            refuse_recurrence(node, "ONNX")


def _refuse_bags(graph: fx.Graph) -> None:
    """Refuse `nn.EmbeddingBag`, whose translation ends the process that loads it (ONNX Runtime 1.32).

    Raises:
        ExportError: there is one.
    """
    for op in operations(graph):
        if op.is_function and op.name == "embedding_bag":
            raise ExportError(
                f"ONNX has no operator for nn.EmbeddingBag ({op.node.name}), and ONNX Runtime crashes on its "
                "translation. Write it as nn.Embedding with a mean, sum or maximum over the bag, with the same weight, "
                "or deploy for OpenVINO as .xml."
            )


def _write_out_rolls(graph: fx.Graph) -> None:
    """Write shifts by a free size, such as half the height, as two parts that change places: ONNX has no such shift."""
    for op in operations(graph):
        if op.function is not aten.roll.default or not op.argument("dims"):
            continue
        if all(isinstance(shift, int) for shift in op.argument("shifts")):
            continue
        result = op.inputs[0].node
        with graph.inserting_before(op.node):
            for shift, axis in zip(op.argument("shifts"), op.argument("dims"), strict=True):
                # x[-shift:] and x[:-shift], for a shift to either side.
                start = _called(graph, operator.neg, shift)
                parts = [
                    _called(graph, aten.slice.Tensor, result, axis, start, sys.maxsize),
                    _called(graph, aten.slice.Tensor, result, axis, 0, start),
                ]
                result = _called(graph, aten.cat.default, parts, axis)
        op.node.replace_all_uses_with(result)
        graph.erase_node(op.node)


def _called(graph: fx.Graph, function: Any, *args: Any) -> fx.Node:
    node = graph.call_function(function, args)
    values: Any = fx.map_arg(args, lambda operand: Op(operand).value)
    record_value(node, function(*values))
    return node


def _fake_quantize_translation(signed: list[bool]) -> Any:
    """Return the translation of `halfeven::fake_quantize` to a pair of nodes.

    Where the grid is small, a clip of integers stands between them.

    Args:
        signed: for each quantizer, by its number, True if its integers are signed.
    """
    import onnx
    from onnxscript import opset19 as op

    def translate(x: Any, scale: Any, zero_point: Any, quant_min: int, quant_max: int, axis: int, number: int) -> Any:
        kind = onnx.TensorProto.INT8 if signed[number] else onnx.TensorProto.UINT8
        zero = op.Cast(zero_point, to=kind)
        # ONNX ignores the axis of a scalar scale, and 1 is its default, which every version accepts.
        axis = 1 if axis == PER_TENSOR else axis
        integers = op.QuantizeLinear(x, scale, zero, axis=axis)
        if (quant_min, quant_max) not in WHOLE_RANGES:
            ends = [onnx.helper.make_tensor("end", kind, [], [end]) for end in (quant_min, quant_max)]
            integers = op.Clip(integers, *(op.Constant(value=end) for end in ends))
        return op.DequantizeLinear(integers, scale, zero, axis=axis)

    return translate


def _translate_pool(x: Any) -> Any:
    from onnxscript import opset19 as op

    return op.GlobalAveragePool(x)


def _translate_round(x: Any, digits: Any = None) -> Any:
    """Translate the rounding of a free size."""
    import onnx
    from onnxscript import opset19 as op

    return op.Cast(op.Round(x), to=onnx.TensorProto.INT64)


def _translate_branch(x: Any, limit: float) -> Any:
    from onnxscript import opset19 as op

    return op.Identity(x)


def _translate_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    from onnxscript import opset19 as op

    # ONNX Runtime makes a Gemm of a product of matrices, and computes that with weights in float: as a batch of one
    # matrix it reads integers.
    matrix = x.shape is not None and len(x.shape) == 2
    product = op.MatMul(op.Unsqueeze(x, [0]) if matrix else x, op.Transpose(weight, perm=[1, 0]))
    product = product if bias is None else op.Add(product, bias)
    return op.Squeeze(product, [0]) if matrix else product
