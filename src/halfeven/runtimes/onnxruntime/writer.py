"""ONNX for ONNX Runtime: products of weights alone as its own operator, which holds the precision it computes in.

A pair of DequantizeLinear and MatMul becomes that operator in the runtime too, but there a session's option decides the
precision: by default the runtime rounds the inputs of the product to 8 bits, which no quantizer of the model does.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from halfeven.deployment.deployed import Deployed
from halfeven.deployment.quantize_op import WEIGHT_SUFFIX
from halfeven.runtimes.onnx import writer
from halfeven.runtimes.onnxruntime.activations import DOMAIN, TRANSLATIONS
from halfeven.runtimes.onnxruntime.gates import write_gates_as_sums

FLOAT32_ACCURACY = 1
"""`accuracy_level` of a product that reads its inputs as they are."""

LARGEST_BLOCK = 128
SMALLEST_BLOCK = 16
"""Inputs that share a scale, a power of 2: a channel's scale is repeated for each block of its weights."""


def write(program: torch.export.ExportedProgram, deployed: Deployed, path: Path) -> None:
    """Write the program of a deployed model as an ONNX file for ONNX Runtime, with a free batch size."""
    model = writer.named_model(program, deployed, TRANSLATIONS)
    write_gates_as_sums(model)
    if deployed.quantizers and all(quantizer.weight for quantizer in deployed.quantizers):
        fuse_products(model)
    writer.write_model(model, path)


def fuse_products(model: Any) -> None:
    """Write each product with dequantized weights as a MatMulNBits in float32, in place; the weights stay integers."""
    for node in list(model.graph):
        if node.op_type == "MatMul" and (pair := _weight_dequantizer(node)) is not None:
            _fuse_pair(model, node, pair)


def _weight_dequantizer(node: Any) -> Any:
    """Return the DequantizeLinear of a product's weights [inputs, outputs], with a scale for each output; None where
    the second factor is anything else."""
    pair = node.inputs[1].producer()
    if pair is None or pair.op_type != "DequantizeLinear" or not pair.name.endswith(WEIGHT_SUFFIX):
        return None
    integers, scale = (value.const_value for value in pair.inputs[:2])
    if integers is None or scale is None or len(integers.shape) != 2:
        return None
    per_output = tuple(scale.shape) in ((), (integers.shape[1],))
    return pair if per_output else None


def _fuse_pair(model: Any, node: Any, pair: Any) -> None:
    import onnx_ir

    graph = model.graph
    integers = pair.inputs[0].const_value
    bits = 4 if integers.dtype == onnx_ir.DataType.INT4 else 8
    # MatMul has its weights as [inputs, outputs], MatMulNBits as [outputs, inputs].
    weight = integers.numpy().astype(np.int16).T  # [outputs, inputs]
    scale = np.broadcast_to(pair.inputs[1].const_value.numpy().astype(np.float32), weight.shape[:1])
    block = block_of(weight.shape[1])
    packed = packed_blocks(weight, bits, block)
    # The kernel wants a scale for each block, and all blocks of an output have the same: [outputs * blocks].
    scales = np.repeat(scale, packed.shape[1])
    names = {"integers": packed, "scale": scales}
    constants = []
    for ending, values in names.items():
        name = f"{pair.name}.blocks.{ending}"
        if name not in graph.initializers:
            graph.register_initializer(onnx_ir.val(name, const_value=onnx_ir.tensor(values, name=name)))
        constants.append(graph.initializers[name])
    sizes = {"K": weight.shape[1], "N": weight.shape[0], "bits": bits, "block_size": block}
    product = onnx_ir.node(
        "MatMulNBits",
        [node.inputs[0], *constants],
        {**sizes, "accuracy_level": FLOAT32_ACCURACY},
        domain=DOMAIN,
        name=node.name,
    )
    product.outputs[0].name = node.outputs[0].name
    product.outputs[0].shape = node.outputs[0].shape
    product.outputs[0].type = node.outputs[0].type
    graph.insert_before(node, product)
    node.outputs[0].replace_all_uses_with(product.outputs[0])
    graph.remove(node, safe=True)
    model.opset_imports[DOMAIN] = 1
    if not pair.outputs[0].uses():
        unread = [value for value in pair.inputs if value is not None]
        graph.remove(pair, safe=True)
        for value in unread:
            if not value.uses():
                graph.initializers.pop(value.name, None)


def block_of(inputs: int) -> int:
    """Return the size of a block: the smallest that holds all inputs, within bounds."""
    size = SMALLEST_BLOCK
    while size < min(inputs, LARGEST_BLOCK):
        size *= 2
    return size


def packed_blocks(weight: Any, bits: int, block: int) -> Any:
    """Return integers [outputs, inputs] as bytes [outputs, blocks, bytes of a block], counted from the type's smallest.

    Two of 4 bits lie in a byte, the first in its lower half. The end of the last block is filled with zeros.
    """
    outputs, inputs = weight.shape
    blocks = -(-inputs // block)
    padded = np.zeros((outputs, blocks * block), np.int16)
    padded[:, :inputs] = weight
    # Without zero points, MatMulNBits takes the middle of the codes for 0: 8 of 4 bits, 128 of 8.
    codes = (padded + (1 << (bits - 1))).astype(np.uint8).reshape(outputs, blocks, block)
    return codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4


def unpacked_blocks(packed: Any, bits: int, inputs: int) -> Any:
    """Return the integers [outputs, inputs] of packed blocks."""
    halves = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1)
    codes = halves.reshape(packed.shape[0], -1)[:, :inputs]
    return codes.astype(np.int16) - (1 << (bits - 1))
