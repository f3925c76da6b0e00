"""OpenVINO's own account of the kernels that it executed, for the layers and products of the file."""

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from halfeven.runtimes.layer_execution import KernelTime, LayerExecution

INTEGER_TYPES = ("u8", "i8", "u4", "i4")

LAYER_KERNELS = ("Convolution", "Deconvolution", "FullyConnected")


def executed_layers(compiled: Any, layers: Sequence[str]) -> list[LayerExecution]:
    """Return the execution of each named layer, in the order of the file.

    Its precision is "unknown" where the runtime does not mention it.
    """
    found: dict[str, LayerExecution] = {}
    nameless = []
    for info, _ in _executed(compiled):
        for name in _layers(info):
            found.setdefault(name, _described(name, info))
        if _is_nameless(info, layers):
            nameless.append(info)
    # The plugin sometimes names a linear layer after the scaling behind it alone.
    lost = [layer for layer in layers if layer not in found]
    if len(lost) == len(nameless):
        found |= {layer: _described(layer, info) for layer, info in zip(lost, nameless, strict=True)}
    return [found.get(layer, LayerExecution(layer, "unknown", "", integer=False)) for layer in layers]


def operators_in(compiled: Any, kind: str) -> set[str]:
    """Return the names of the file's operators that the kernels of a kind compute, layers and quantizers."""
    # The plugin splits a quantizer that has a reader of real values.
    return {
        name.removesuffix("_original")
        for info, _ in _executed(compiled)
        if info["layerType"] == kind
        for name in _layers(info)
    }


def _is_nameless(info: Mapping[str, str], layers: Sequence[str]) -> bool:
    """Return True for a layer's kernel whose names are all the plugin's own, such as "Multiply_12732".

    A layer that the plan leaves in float has the name of its operator, with a slash.
    """
    names = info.get("originalLayersNames", "")
    return info["layerType"] in LAYER_KERNELS and "/" not in names and set(_layers(info)).isdisjoint(layers)


def executed_products(compiled: Any, products: Set[str]) -> list[LayerExecution]:
    """Return the executions of the products of two activations, which have these names in the file."""
    found = []
    for info, types in _executed(compiled):
        if info["layerType"] == "MatMul":
            found.append(_described(info["originalLayersNames"], info))
        elif info["layerType"] == "Subgraph" and not products.isdisjoint(_layers(info)):
            found += _attention(info, types)
    return found


def _attention(info: dict[str, str], types: Sequence[str]) -> list[LayerExecution]:
    """Return the executions of both products of an attention that the plugin runs as a single operator.

    It does so where there is AVX-512. The first product is of two inputs, the second of the softmax inside and a third
    input; the mask is not multiplied.
    """
    integers = sum(one in INTEGER_TYPES for one in types)
    names = info["originalLayersNames"]
    return [
        LayerExecution(names, info["runtimePrecision"], info["primitiveType"], integer=integers >= needed)
        for needed in (2, 3)
    ]


def _executed(compiled: Any) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Yield the plugin's account of each operator that it runs, and the types of the operator's inputs."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: value.astype(str) for key, value in node.get_rt_info().items()}
        if info.get("layerType") != "Const":
            yield info, [port.get_element_type().get_type_name() for port in node.inputs()]


def _layers(info: Mapping[str, str]) -> list[str]:
    """Return the operators of the file that an operator of the runtime was made of."""
    return [layer_of(name) for name in info.get("originalLayersNames", "").split(",")]


def _described(name: str, info: Mapping[str, str]) -> LayerExecution:
    precision = info["runtimePrecision"]
    kernel = info["primitiveType"]
    reads_integers = precision in INTEGER_TYPES
    # oneDNN's names of integer kernels contain I8 or i8.
    computes = "i8" in kernel.lower()
    return LayerExecution(name, precision, kernel, integer=reads_integers and computes, stored=reads_integers)


def kernel_times(compiled: Any, request: Any, runs: int) -> list[KernelTime]:
    """Return the mean time of each kernel over some runs of a request of a model that was compiled to count it.

    The runtime knows no median, so the first run, which allocates, is one that it counts too.
    """
    for _ in range(runs):
        request.infer()
    found = []
    for info, _ in _executed(compiled):
        # In microseconds, and no number for what was not run.
        if (counted := info.get("execTimeMcs", "")).isdigit():
            execution = _described(info["originalLayersNames"], info)
            found.append(
                KernelTime(
                    execution.layer.split(",")[0],
                    tuple(_layers(info)),
                    info["layerType"],
                    execution.kernel,
                    execution.precision,
                    int(counted) / 1000,
                    integer=execution.integer,
                )
            )
    return found


def layer_of(name: str) -> str:
    """Return the layer of an operator: the plugin and the ONNX front end add "/DequantizationMultiply" and the like."""
    return name.split("/")[0]
