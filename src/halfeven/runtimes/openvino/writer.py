"""Write a deployed model as OpenVINO IR with int8 weights."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export.graph_signature import ConstantArgument, InputKind, TensorArgument

from halfeven.deployment.deployed import Deployed
from halfeven.deployment.file_interface import input_values
from halfeven.deployment.layer_calls import call_name
from halfeven.deployment.quantize_op import PER_TENSOR, WEIGHT_SUFFIX
from halfeven.files import replacing
from halfeven.graph.model_inputs import constant_size
from halfeven.runtimes.openvino import recurrences
from halfeven.runtimes.openvino.complex_numbers import complex_numbers_named
from halfeven.runtimes.openvino.interface import write_interface
from halfeven.runtimes.openvino.recurrences import keep_recurrences_whole
from halfeven.runtimes.openvino.size_arithmetic import size_translations
from halfeven.runtimes.openvino.sums_in_kernels import MARK_LEVELS
from halfeven.runtimes.openvino.telemetry import silently


@silently()
def convert(program: torch.export.ExportedProgram, names: Sequence[str]) -> Any:
    """Return the `openvino.Model` of an exported program whose quantizers are `halfeven::fake_quantize` operators.

    Each FakeQuantize bears its quantizer's name from `names`, and each layer with a quantized weight the layer's, so
    that what runs can be found again in the file and in the runtime.
    """
    import openvino
    from openvino.frontend.pytorch import ConversionExtension

    # On the program: operators that the front end would take apart, and results that it cannot name.
    set_repeated_outputs_apart(program)
    keep_products_whole(program)
    keep_recurrences_whole(program)
    traced = traced_names(program, names)
    translations = {
        "fake_quantize": lambda context: _translate_fake_quantize(context, names),
        "matmul": _translate_matmul,
        "branch_of_sum": _translate_branch_of_sum,
        "recurrence": recurrences.translation(),
    }
    named = {f"halfeven.{name}.default": made for name, made in translations.items()} | size_translations()
    extensions = [ConversionExtension(name, made) for name, made in named.items()]
    model = openvino.convert_model(program, extension=extensions)
    _drop_constant_inputs(model, program)
    # The front end forgets which sizes are fixed; the plugin's kernels are faster when it knows.
    sizes = zip(model.inputs, input_values(program), strict=True)
    model.reshape({port: openvino.PartialShape(_static_sizes(value)) for port, value in sizes})
    model.validate_nodes_and_infer_types()
    # On the converted model: operators that the plugin computes in float, or wrongly. Names come last, because these
    # passes replace operators.
    write_out_ceilings(model)
    write_out_moves(model)
    write_out_means(model)
    write_out_extremes(model)
    name_moved_tensors(model, traced)
    name_layers(model, set(names))
    return model


def _drop_constant_inputs(model: Any, program: torch.export.ExportedProgram) -> None:
    """Remove the inputs that are no tensors (None, a switch): the program has their values as constants."""
    specs = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    parameters = model.get_parameters()
    if len(parameters) == len(specs):
        for parameter, argument in zip(parameters, specs, strict=True):
            if isinstance(argument, ConstantArgument):
                model.remove_parameter(parameter)


def set_repeated_outputs_apart(program: torch.export.ExportedProgram) -> None:
    """Give each output of a program a tensor of its own: the front end cannot name a tensor that is returned twice.

    The plugin removes the axis that comes and goes.
    """
    output = program.graph.output_node()
    values = list(output.args[0])
    for place, value in enumerate(values):
        if isinstance(value, fx.Node) and value in values[:place]:
            values[place] = _moved_there_and_back(program.graph, value)
            program.graph_signature.output_specs[place].arg = TensorArgument(values[place].name)
    output.args = (tuple(values),)


def _moved_there_and_back(graph: fx.Graph, value: fx.Node) -> fx.Node:
    result = value
    for operator in (torch.ops.aten.unsqueeze.default, torch.ops.aten.squeeze.dim):
        with graph.inserting_before(graph.output_node()):
            result = graph.call_function(operator, (result, 0))
        before = result.args[0]
        assert isinstance(before, fx.Node)
        result.meta["val"] = operator(before.meta["val"], 0)
    return result


def keep_products_whole(program: torch.export.ExportedProgram) -> None:
    """Make each product of activations a single operator.

    The front end's decomposition expands both factors to their own size first, which is a copy of each in the runtime
    where the batch is free.
    """
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.matmul.default:
            node.target = torch.ops.halfeven.matmul.default


def write_out_ceilings(model: Any) -> None:
    """Write max pools that round their output size up as max pools that are padded to that size.

    The plugin's integers do not pass through the former, and the layer behind would run in float.
    """
    from openvino import opset8 as opset

    for node in model.get_ordered_ops():
        if node.get_type_name() != "MaxPool" or not node.get_attributes()["rounding_type"].startswith("ceil"):
            continue
        sizes = node.input_value(0).get_partial_shape()
        results = node.output(0).get_partial_shape()
        axes = range(2, sizes.rank.get_length())
        if any(sizes[axis].is_dynamic for axis in axes):
            continue
        given = node.get_attributes()
        # Padding at the end = (results - 1) * stride + dilation * (kernel - 1) + 1 - size - padding at the start: with
        # it, rounding down gives the size that rounding up gave. A max pool pads with minus infinity, which changes no
        # maximum.
        ends = [
            max(
                given["pads_end"][i],
                (results[axis].get_length() - 1) * given["strides"][i]
                + given["dilations"][i] * (given["kernel"][i] - 1)
                + 1
                - sizes[axis].get_length()
                - given["pads_begin"][i],
            )
            for i, axis in enumerate(axes)
        ]
        pool = opset.max_pool(
            node.input_value(0), given["strides"], given["dilations"], given["pads_begin"], ends, given["kernel"]
        )
        # Names are how layers and tensors of the file are found again, so a replacement takes over its node's name.
        pool.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(pool.output(0))


def write_out_moves(model: Any) -> None:
    """Write shifts along an axis (Swin's windows) and repetitions as indices.

    The plugin's integers do not pass through the operators that the front end makes of them, and the layer behind would
    run in float.
    """
    from openvino import opset8 as opset

    for node in model.get_ordered_ops():
        if not (indices := _indices_by_axis(node)):
            continue
        value = node.input_value(0)
        for axis, index in indices.items():
            value = opset.gather(value, index, np.int64(axis)).output(0)
        value.get_node().set_friendly_name(node.get_friendly_name())
        node.output(0).replace(value)


def write_out_means(model: Any) -> None:
    """Write means along one axis of a sequence as means of images, with a reshape behind.

    The plugin computes wrong numbers where it merges the former with a quantizer that has a range for each channel, as
    a quantizer behind a BatchNorm has (LeViT's head; OpenVINO 2026.4).
    """
    from openvino import opset8 as opset

    for node in model.get_ordered_ops():
        if node.get_type_name() != "ReduceMean":
            continue
        rank = node.input_value(0).get_partial_shape().rank
        axes = node.input_value(1).get_node()
        if rank.is_dynamic or rank.get_length() != 3 or axes.get_type_name() != "Constant" or axes.get_data().size != 1:
            continue
        axis = int(axes.get_data().item()) % 3
        # A further axis of size 1 makes an image of the sequence; the mean over both axes is the same.
        image = opset.unsqueeze(node.input_value(0), np.int64(axis))
        mean = opset.reduce_mean(image, np.array([axis, axis + 1]), keep_dims=True)
        kept = node.get_attributes()["keep_dims"]
        sequence = opset.squeeze(mean, np.array([axis] if kept else [axis, axis + 1]))
        mean.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(sequence.output(0))


def write_out_extremes(model: Any) -> None:
    """Write maxima and minima over axes with a reshape behind.

    The plugin merges what follows directly, such as a quantizer, and computes wrong numbers (OpenVINO 2026.4, in every
    number of axes; other reductions are right).
    """
    from openvino import opset8 as opset

    makers = {"ReduceMax": opset.reduce_max, "ReduceMin": opset.reduce_min}
    for node in model.get_ordered_ops():
        if (reduce := makers.get(node.get_type_name())) is None:
            continue
        value = node.input_value(0)
        axes = node.input_value(1)
        kept = node.get_attributes()["keep_dims"]
        # Axes that the result has are dropped and put back, axes that it lacks are kept and then dropped: a reshape
        # stands behind the reduction in any case.
        reduced = reduce(value, axes, keep_dims=not kept)
        reshaped = opset.unsqueeze(reduced, axes) if kept else opset.squeeze(reduced, axes)
        reduced.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(reshaped.output(0))


def _indices_by_axis(node: Any) -> dict[int, Any]:
    """Return the indices of the values of each axis that a shift or repetition moves; none where they are unknown."""
    kind = node.get_type_name()
    if kind not in ("Roll", "Tile"):
        return {}
    given = [port.get_source_output().get_node() for port in node.inputs()[1:]]
    sizes = node.input_value(0).get_partial_shape()
    if sizes.rank.is_dynamic or any(constant.get_type_name() != "Constant" for constant in given):
        return {}
    counts, *axes = (constant.get_data().reshape(-1).tolist() for constant in given)
    places = axes[0] if axes else range(len(sizes))
    if len(places) != len(counts):
        return {}
    found: dict[int, Any] = {}
    for axis, count in zip(places, counts, strict=True):
        if count == (0 if kind == "Roll" else 1):
            continue
        if sizes[axis].is_dynamic or axis in found:
            return {}
        size = sizes[axis].get_length()
        # A roll by `count` reads from `count` places before, and a repetition reads the places in turn.
        found[axis] = (np.arange(size) - count) % size if kind == "Roll" else np.arange(size * count) % size
    return found


def _static_sizes(value: torch.Tensor) -> list[int]:
    return [-1 if size is None else size for size in map(constant_size, value.shape)]


def _translate_matmul(context: Any) -> list[Any]:
    """Return a MatMul as numpy defines it, of any number of axes."""
    from openvino import opset13 as opset

    return [opset.matmul(context.get_input(0), context.get_input(1), False, False).output(0)]


def _translate_fake_quantize(context: Any, names: Sequence[str]) -> list[Any]:
    """Return a FakeQuantize whose limits are grid points: the plugin recovers scale and zero point from them."""
    from openvino import opset13 as opset

    x = context.get_input(0)
    scale, zero_point = (_constant_value(context.get_input(i)).astype(np.float32) for i in (1, 2))
    quant_min, quant_max, axis, number = (int(_constant_value(context.get_input(i))) for i in (3, 4, 5, 6))
    # In float32 from the snapped scale, of 16 significand bits: the product with a small integer is exact, and so is
    # the scale that the plugin computes back as (high - low) / (levels - 1).
    low = (quant_min - zero_point) * scale
    high = (quant_max - zero_point) * scale
    if axis != PER_TENSOR:
        shape = np.ones(x.get_partial_shape().rank.get_length(), dtype=np.int64)
        shape[axis] = -1
        low = low.reshape(shape)
        high = high.reshape(shape)
    ends = [opset.constant(end.astype(np.float32)) for end in (low, high)]
    # Input and output limits are equal: FakeQuantize quantizes to `levels` steps and dequantizes in one operator.
    node = opset.fake_quantize(x, *ends, *ends, levels=quant_max - quant_min + 1)
    node.set_friendly_name(names[number])
    return list(node.outputs())


def _translate_branch_of_sum(context: Any) -> list[Any]:
    """Return a FakeQuantize that the plugin does not run: it tells it which sums are a part of a layer's kernel."""
    from openvino import opset13 as opset

    limit = np.float32(_constant_value(context.get_input(1)))
    ends = [opset.constant(end) for end in (-limit, limit)]
    return list(opset.fake_quantize(context.get_input(0), *ends, *ends, levels=MARK_LEVELS).outputs())


def _constant_value(output: Any) -> np.ndarray[Any, Any]:
    return np.asarray(output.get_node().get_data())


LAYER_TYPES = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")


def name_moved_tensors(model: Any, traced: Mapping[str, str]) -> None:
    """Name the tensors after their quantizers that are computed by operators of another name.

    The front end moves operators through a FakeQuantize, such as the mean of a transposed tensor; the FakeQuantize is
    then another node under a new name. The name that the tracer gave to the tensor stays with its values, wherever they
    are computed. It is trusted where it says of all other tensors what their operators say.

    Args:
        model: a converted model, whose other tensors are named.
        traced: the tracer's name of each quantized tensor -> its quantizer's.
    """
    nodes = model.get_ordered_ops()
    in_place = {node.get_friendly_name() for node in nodes}.intersection(traced.values())
    moved = []
    for node in nodes:
        for port in node.outputs():
            found = {traced[name] for name in port.get_names() if name in traced}
            # The tracer calls the result of a quantizer by the name of another: in this file its names say nothing.
            if found and node.get_friendly_name() in in_place - found:
                return
            if lost := found - in_place:
                moved.append((port, lost))
    for port, lost in moved:
        if port.get_node().get_friendly_name() not in in_place:
            port.get_tensor().set_names(lost)


def traced_names(program: torch.export.ExportedProgram, names: Sequence[str]) -> dict[str, str]:
    """Return the tracer's names of the tensors of activations, as the front end writes them -> their quantizers'."""
    made = torch.ops.halfeven.fake_quantize.default
    calls = [node for node in program.graph.nodes if node.target is made]
    found = {f"{node.name}:0": names[int(node.args[-1])] for node in calls}
    return {traced: name for traced, name in found.items() if not name.endswith(WEIGHT_SUFFIX)}


def name_layers(model: Any, quantizers: set[str]) -> None:
    """Name each layer after its weight, "<layer>.weight_quantizer", and the tensors after their quantizers.

    The front end may pull a transposition through a FakeQuantize: the node that then bears the quantizer's name is it.
    """
    used: dict[str, int] = {}
    ordered = model.get_ordered_ops()
    place = {node.get_name(): index for index, node in enumerate(ordered)}
    for node in ordered:
        name = node.get_friendly_name()
        if name in quantizers and not name.endswith(WEIGHT_SUFFIX):
            node.output(0).get_tensor().set_names({name})
        if not name.endswith(WEIGHT_SUFFIX):
            continue
        layer = name.removesuffix(WEIGHT_SUFFIX)
        # Calls of a layer are numbered in the order of the graph, as `named_calls` numbers them.
        for reader in sorted(_layers_reading(node), key=lambda reader: place[reader.get_name()]):
            count = used[layer] = used.get(layer, 0) + 1
            _name_layer(reader, call_name(layer, count))


def _name_layer(node: Any, name: str) -> None:
    """Name a layer, and a multiplication by or addition of a constant behind it.

    The plugin makes a single operator of both, under the name of the latter.
    """
    node.set_friendly_name(name)
    readers = [port.get_node() for port in node.output(0).get_target_inputs()]
    if len(readers) == 1 and readers[0].get_type_name() in ("Multiply", "Add"):
        operands = [source.get_node().get_type_name() for source in readers[0].input_values()]
        if "Constant" in operands:
            readers[0].set_friendly_name(f"{name}/{readers[0].get_type_name()}")


def _layers_reading(node: Any) -> Iterator[Any]:
    for port in node.output(0).get_target_inputs():
        reader = port.get_node()
        if reader.get_type_name() in LAYER_TYPES:
            yield reader
        # Operators that the front end may put between a weight and its layer.
        elif reader.get_type_name() in ("Reshape", "Transpose", "Convert", "Multiply", "FakeQuantize"):
            yield from _layers_reading(reader)


@silently()
def write(program: torch.export.ExportedProgram, deployed: Deployed, path: Path) -> None:
    """Write an IR (.xml and .bin); float constants keep their 32 bits, so that they are what was simulated."""
    import openvino

    with complex_numbers_named(deployed.model):
        converted = convert(program, [quantizer.name for quantizer in deployed.quantizers])
    if deployed.interface is not None:
        write_interface(converted, deployed.interface)
    weights = path.with_suffix(".bin")
    # The weights first: a new .xml must never stand beside an old .bin.
    with replacing(weights, path) as folder:
        whole = folder / path.name
        openvino.save_model(converted, whole, compress_to_fp16=False)
        _check_complete(whole)
        whole.write_text(re.sub(r">\s+<", "><", whole.read_text()))  # a third of the file is indentation


def _check_complete(path: Path) -> None:
    """Check that an IR is as long as it says: on a full disk OpenVINO writes a part, and says nothing."""
    text = path.read_text()
    constants = re.findall(r'offset="(\d+)"[^>]*size="(\d+)"', text)
    size = max((int(offset) + int(length) for offset, length in constants), default=0)
    if not text.rstrip().endswith("</net>") or path.with_suffix(".bin").stat().st_size < size:
        raise RuntimeError("OpenVINO wrote only a part of the file")
