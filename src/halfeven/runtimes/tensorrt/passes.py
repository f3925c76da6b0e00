"""TensorRT's form of a deployed model: only signed activations without a zero point; float16 where the file asks it."""

from typing import Any

import torch
from torch import Tensor, nn

from halfeven.deployment.deployed import Deployed
from halfeven.deployment.quantize_op import PER_TENSOR, ExportedQuantizer
from halfeven.errors import ExportError, PlacementError
from halfeven.quantization.arithmetic import per_channel

LARGEST_HALF = torch.finfo(torch.float16).max
SMALLEST_HALF = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
"""Smallest number above 0: TensorRT refuses scales of 0."""


def prepare_graph(deployed: Deployed) -> None:
    """Check that TensorRT has integers for every grid of a deployed model; nothing is changed.

    Raises:
        PlacementError: an activation is unsigned.
    """
    unsigned = [q.name.removeprefix("quantizers.") for q in deployed.quantizers if not (q.weight or q.signed)]
    if unsigned:
        name = deployed.target.name
        raise PlacementError(
            f"{name} supports only signed activations without a zero point, and {len(unsigned)} of this model are "
            f'unsigned ({", ".join(unsigned[:3])}), so other integers would run. Prepare it with target="{name}"; '
            "OpenVINO and ONNX Runtime run such a model too."
        )


@torch.no_grad()
def round_to_half(deployed: Deployed) -> None:
    """Round scales, weights and all other numbers of a deployed model to float16, in place.

    A strongly typed network computes in the types of its file, and DequantizeLinear returns the type of its scale. The
    integers of weights stay what they were: rounding moves a scale by at most 2^-11 of its size, and so an integer by
    0.06. Scales below 8e-6, where float16 has few bits, give weights other integers, the nearest on the new grid.

    Raises:
        ExportError: a number, or the range of a quantizer, is larger than float16 can be.
    """
    for quantizer in deployed.quantizers:
        _check_range(quantizer)
        quantizer.scale = rounded_to_half(quantizer.scale).clamp_min(SMALLEST_HALF)
    for name, module in deployed.model.named_modules():
        if isinstance(module, ExportedQuantizer):
            continue
        # Weights first, on the rounded scales: below, the products of scales and integers are rounded themselves.
        if isinstance(own_quantizer := getattr(module, "weight_quantizer", None), ExportedQuantizer):
            _put_on_grid(module, own_quantizer)
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if tensor.dtype is torch.float32:
                tensor.copy_(_round_checked(tensor, f"{name}.{own}"))


def rounded_to_half(x: Tensor) -> Tensor:
    """Return the nearest numbers of float16, in float32; those beyond its ends become infinite."""
    return x.half().float()


def _check_range(quantizer: ExportedQuantizer) -> None:
    largest = float(quantizer.scale.max()) * max(-quantizer.quant_min, quantizer.quant_max)
    if largest > LARGEST_HALF:
        raise ExportError(
            f"The range of {quantizer.name.removeprefix('quantizers.')} ends at {largest:.6g}, and float16 at "
            f"{LARGEST_HALF:.0f}, so the file would compute infinities. Write it with "
            'float_precision="f32".'
        )


def _put_on_grid(layer: Any, quantizer: ExportedQuantizer) -> None:
    axis = None if quantizer.axis == PER_TENSOR else quantizer.axis
    scale = per_channel(quantizer.scale, axis, layer.weight.ndim)
    integers = torch.round(layer.weight / scale).clamp(quantizer.quant_min, quantizer.quant_max)
    layer.weight = nn.Parameter(integers * scale, requires_grad=False)


def _round_checked(tensor: Tensor, name: str) -> Tensor:
    finite = tensor[tensor.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    if largest > LARGEST_HALF:
        raise ExportError(
            f"{name} holds {largest:.6g}, and float16 ends at {LARGEST_HALF:.0f}, so the file would compute "
            'infinities. Write it with float_precision="f32".'
        )
    return rounded_to_half(tensor)
