"""TensorRT: evaluating its file as ONNX defines the operators, since it is not run here."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from halfeven.deployment.quantize_op import WEIGHT_SUFFIX
from halfeven.runtimes.layer_execution import KernelTime, LayerExecution
from halfeven.runtimes.onnx.file import ONNXFile

COMMUTING = frozenset(
    (
        *("Identity", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Expand"),
        *("Slice", "Split", "MaxPool", "Gather", "Concat"),
    )
)
"""Operators that commute with a quantizer, so that a pair before them serves the layer behind them."""


class TensorRTFile(ONNXFile):
    """A file for TensorRT, which is not run here: its operators are evaluated as they are written, in float.

    A layer counts as integer where both its input and its weight come from symmetric 8-bit pairs, the pattern that
    TensorRT's documentation names.
    """

    runtime = "ONNX's own semantics (TensorRT itself was not run)"
    settings: Sequence[str] = ()
    settings_of_own_precision: Sequence[str] = ()
    literal = True

    def executed_layers(self, layers: Sequence[str]) -> list[LayerExecution]:
        found = {node.name: node for node in self.model.graph.node if node.name in layers}
        return [self._planned(layer, found.get(layer)) for layer in layers]

    def executed_products(self) -> list[LayerExecution]:
        nodes = [node for node in self.model.graph.node if node.op_type == "MatMul" and not self._weighted(node)]
        return [self._planned(node.name, node) for node in nodes]

    def kernel_times(self, inputs: Sequence[Tensor], runs: int = 10) -> list[KernelTime]:
        return []

    def _planned(self, layer: str, node: Any) -> LayerExecution:
        if node is None:
            return LayerExecution(layer, "unknown", "", integer=False)
        # TensorRT takes explicit quantization literally: without a pair on both inputs, the layer runs in float.
        integer = all(self._pair(name) is not None for name in node.input[:2])
        return LayerExecution(layer, "int8" if integer else "float32", f"{node.op_type}, not run", integer=integer)

    def _weighted(self, node: Any) -> bool:
        pair = self._pair(node.input[1])
        return pair is not None and pair.name.endswith(WEIGHT_SUFFIX)

    def _pair(self, name: str) -> Any:
        """Return the DequantizeLinear that a tensor comes from, through operators that commute with it, or None."""
        makers = {output: node for node in self.model.graph.node for output in node.output}
        node = makers.get(name)
        while node is not None and node.op_type in COMMUTING:
            node = makers.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None
