"""Names of inputs, outputs and axes in an OpenVINO model, and facts about it."""

from collections.abc import Mapping
from typing import Any

from halfeven.deployment.file_interface import FLOAT_PRECISION, FileInterface, FloatPrecision

GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
"""Setting: 0 keeps the plugin from quantizing the inputs of linear layers with integer weights on its own."""

LETTERS = {"batch": "n", "channels": "c", "depth": "d", "height": "h", "width": "w"}
"""Words of layouts -> the letters that mean the same there."""


def write_interface(model: Any, interface: FileInterface) -> None:
    """Give an `openvino.Model` the names of a file's interface, in place.

    Free axes are named in the inputs' layouts, since IR has no names for sizes: "[batch,?,height,width]". Facts are
    in the model's runtime information, under "halfeven".
    """
    import openvino

    for port, name, axes in zip(model.inputs, interface.inputs, interface.axes, strict=True):
        node = port.get_node()
        node.set_friendly_name(name)
        port.get_tensor().set_names({name})
        if axes:
            rank = port.get_partial_shape().rank.get_length()
            node.set_layout(openvino.Layout(f"[{','.join(_layout_names(axes, rank))}]"))
    for result in model.get_results():
        _set_apart(result)
    for port, name in zip(model.outputs, interface.outputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    for name, value in interface.metadata.items():
        model.set_rt_info(value, ["halfeven", name])
    if interface.metadata.get(FLOAT_PRECISION) == "runtime":
        # What a default session reads from the file itself: the precision of floats is its choice, integers are not.
        model.set_rt_info("0", ["runtime_options", GROUP_SIZE])


def _layout_names(axes: Mapping[int, str], rank: int) -> list[str]:
    """Return the name of each axis for a layout, where each name may stand once: "?" for all that come later."""
    found: list[str] = []
    seen: set[str] = set()
    for axis in range(rank):
        name = axes.get(axis, "?")
        letter = LETTERS.get(name.lower(), name.lower())
        found.append("?" if letter in seen else name)
        seen |= {letter} - {"?"}
    return found


def _set_apart(result: Any) -> None:
    """Put a conversion that changes nothing before an output that shares its tensor, and so its names.

    The runtime leaves it out. Shared are inputs, and tensors that are several outputs.
    """
    from openvino import opset13 as opset

    source = result.input_value(0)
    is_input = source.get_node().get_type_name() == "Parameter"
    results = sum(port.get_node().get_type_name() == "Result" for port in source.get_target_inputs())
    if is_input or results > 1:
        copy = opset.convert(source, source.get_element_type().to_string())
        result.input(0).replace_source_output(copy.output(0))


def float_precision_in(model: Any) -> FloatPrecision:
    """Return the precision that an `openvino.Model`, read from IR, was written for."""
    path = ["halfeven", FLOAT_PRECISION]
    return "runtime" if model.has_rt_info(path) and model.get_rt_info(path).astype(str) == "runtime" else "f32"
