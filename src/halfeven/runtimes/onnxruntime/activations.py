"""Activation functions as operators of ONNX Runtime's own domain, each a single kernel.

The runtime makes these kernels of the operators that ONNX has for the functions, but not behind a quantizer: it first
gives each reader a DequantizeLinear of its own, and then finds its pattern no more. A function that is written as one
operator has one reader, and computes the same bits.
"""

from typing import Any

import torch

from halfeven.runtimes.onnx.writer import Translations

DOMAIN = "com.microsoft"


def _own_operator(name: str, x: Any, **attributes: float) -> Any:
    """Return the result of an operator of the runtime's domain, of one tensor and numbers."""
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("X", "T")],
        outputs=[OpSchema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[OpSchema.Attribute(attribute, OpSchema.AttrType.FLOAT) for attribute in attributes],
    )
    return Op(Opset(DOMAIN, 1), name, schema)(x, **attributes)


def _translate_silu(x: Any) -> Any:
    return _own_operator("QuickGelu", x, alpha=1.0)  # x * sigmoid(alpha * x)


def _translate_gelu(x: Any, approximate: str = "none") -> Any:
    return _own_operator("FastGelu" if approximate == "tanh" else "Gelu", x)


def _translate_elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    """Return scale * ELU(input_scale * x) without factors of 1, which the exporter's own translation writes."""
    from onnxscript import opset19 as op

    x = x if input_scale == 1.0 else op.Mul(x, op.Constant(value_float=input_scale))
    result = op.Elu(x, alpha=alpha)
    return result if scale == 1.0 else op.Mul(result, op.Constant(value_float=scale))


TRANSLATIONS: Translations = {
    torch.ops.aten.silu.default: _translate_silu,
    torch.ops.aten.gelu.default: _translate_gelu,
    torch.ops.aten.elu.default: _translate_elu,
}
"""Operator -> its form in files for ONNX Runtime."""
