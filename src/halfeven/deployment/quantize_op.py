"""Quantizers as writers translate them: one operator with the grid written out."""

import copy

import torch
from torch import Tensor, fx, nn

from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.tree import place
from halfeven.graph.view import module_of
from halfeven.placement.make_plan import regions
from halfeven.quantization.arithmetic import per_channel
from halfeven.quantization.quantizer import Quantizer

WEIGHT_SUFFIX = ".weight_quantizer"
"""The end of the name of a weight's quantizer; before it stands the layer's name."""

PER_TENSOR = -1
"""`axis` of an operator with one scale."""


# Operators of halfeven's own: torch.export and the converters leave them whole, and each writer has a translation for
# them. The fake form of each, which the tracer calls, gives the shape of the result alone.
@torch.library.custom_op("halfeven::fake_quantize", mutates_args=())
def fake_quantize_operator(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int, number: int
) -> Tensor:
    """Quantize and dequantize on a grid whose scale and zero point are tensors of the graph.

    Args:
        x: the tensor.
        scale, zero_point: [] or [channels].
        quant_min, quant_max: the ends of the grid.
        axis: the axis of the channels; -1 for one scale.
        number: the place of the quantizer among those of the model.
    """
    channels = None if axis == PER_TENSOR else axis
    scale = per_channel(scale, channels, x.ndim)
    zero_point = per_channel(zero_point, channels, x.ndim)
    return (torch.clamp(torch.round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale


@fake_quantize_operator.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int, number: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("halfeven::global_average_pool", mutates_args=())
def global_average_pool(x: Tensor) -> Tensor:
    """Return means over all axes after the second, which stay with size 1: ONNX has one operator for it."""
    return x.mean(tuple(range(2, x.ndim)), keepdim=True)


@global_average_pool.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:2], *[1] * (x.ndim - 2)))


@torch.library.custom_op("halfeven::matmul", mutates_args=())
def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return `torch.matmul`, which no exporter takes apart into reshapes, expansions and products of three axes."""
    return torch.matmul(a, b)


@matmul.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@torch.library.custom_op("halfeven::branch_of_sum", mutates_args=())
def branch_of_sum(x: Tensor, limit: float) -> Tensor:
    """Mark a layer's result that the layer's kernel adds to a skip connection.

    Args:
        x: the result.
        limit: the size beyond which the quantizer behind the sum clips, so that larger values make no difference.
    """
    return x.clone()


@branch_of_sum.register_fake
def _(x: Tensor, limit: float) -> Tensor:
    return torch.empty_like(x)


class ExportedQuantizer(nn.Module):
    """A frozen quantizer as a call of `halfeven::fake_quantize`.

    A grid of fewer than 8 bits is carried in 8 with the same scale and zero point, because OpenVINO runs 4-bit weights
    in float and has no kernels for other widths: a clamp keeps an activation inside its own grid, a weight lies on it
    already. With `clips_integers` the clip is left to the file's writer, which clips the integers. With
    `narrow_weights` weights keep their bits: no kernel computes with them as integers.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        quantizer: Quantizer,
        name: str,
        number: int,
        *,
        clips_integers: bool = False,
        narrow_weights: bool = False,
    ) -> None:
        super().__init__()
        self.path = name
        self.number = number
        self.weight = quantizer.weight
        # A layer that is a function has no module to be named after: it is called after its weight's quantizer.
        own = quantizer.weight and not name.endswith(WEIGHT_SUFFIX)
        self.name = f"{name}{WEIGHT_SUFFIX}" if own else name
        self.grid_number = number
        """Number of the quantizer that this one shares scale and zero point with."""
        self.repeats = False
        """True for a quantizer that only completes a pattern of the runtime: the quantized model has no such tensor."""
        scheme = quantizer.scheme
        self.axis = PER_TENSOR if scheme.axis is None else scheme.axis
        self.quant_min = scheme.quant_min
        self.quant_max = scheme.quant_max
        self.signed = scheme.signed
        self.register_buffer("scale", quantizer.scale)
        self.register_buffer("zero_point", quantizer.used_zero_point())
        self.bounds: tuple[float, float] | None = None
        if scheme.bits == 8 or (clips_integers and not self.weight) or (narrow_weights and self.weight):
            return
        if not quantizer.weight:
            # The ends of the own grid as real numbers: the clamp takes the place of the grid's, which has 8 bits now.
            steps = torch.tensor([scheme.quant_min, scheme.quant_max]) - self.zero_point
            low, high = (steps * quantizer.scale).tolist()
            self.bounds = (low, high)
        smallest = -127 if scheme.narrow else -128
        self.quant_min = smallest if scheme.signed else 0
        self.quant_max = 127 if scheme.signed else 255

    def forward(self, x: Tensor) -> Tensor:
        if self.bounds is not None:
            x = torch.clamp(x, *self.bounds)
        result: Tensor = fake_quantize_operator(
            x, self.scale, self.zero_point, self.quant_min, self.quant_max, self.axis, self.number
        )
        return result


def with_exported_quantizers(
    model: nn.Module, *, clips_integers: bool = False, narrow_weights: bool = False
) -> list[ExportedQuantizer]:
    """Exchange all quantizers of a deployed model, in place; return them in the order of their numbers."""
    exported: list[ExportedQuantizer] = []
    for path, module in list(model.named_modules()):
        # Numbers count from 0 without a gap, so that a number is also the quantizer's place in the list.
        for attribute, child in list(module.named_children()):
            if isinstance(child, Quantizer):
                name = f"{path}.{attribute}" if path else attribute
                how = {"clips_integers": clips_integers, "narrow_weights": narrow_weights}
                exported.append(ExportedQuantizer(child, name, len(exported), **how))
                setattr(module, attribute, exported[-1])
    for region in regions(model).values():
        _separate_calls(region, exported)
    return exported


def grid_values(quantizer: ExportedQuantizer) -> tuple[float | int | None, ...]:
    """Return the numbers of a quantizer's grid, equal for quantizers that do the same."""
    ends = (quantizer.quant_min, quantizer.quant_max, quantizer.axis)
    return (*quantizer.scale.flatten().tolist(), *quantizer.zero_point.flatten().tolist(), *ends)


def twin_of(quantizer: ExportedQuantizer, name: str, exported: list[ExportedQuantizer]) -> ExportedQuantizer:
    """Return another quantizer with the same `grid_number`, added to `exported`."""
    twin = copy.deepcopy(quantizer)
    twin.name = name
    twin.path = name
    twin.number = len(exported)
    exported.append(twin)
    return twin


def repeat_quantizer(
    region: CapturedModule,
    node: fx.Node,
    quantizer: ExportedQuantizer,
    path: str,
    prefix: str,
    exported: list[ExportedQuantizer],
) -> None:
    """Insert a quantizer again behind an operator whose result lies on its grid already; no value changes.

    Args:
        region: the part of the model.
        node: the operator.
        quantizer: the quantizer of the grid.
        path: where the new one goes in the region.
        prefix: path of the region in the model, with a dot at its end; "" for the whole model.
        exported: the model's quantizers, to which the new one is added.
    """
    twin = twin_of(quantizer, prefix + path, exported)
    twin.repeats = True
    # The values are integers of the grid already. With the whole range of the type no Clip is written, which would
    # stand between the pair and the operator and keep them from being fused.
    twin.quant_min = -128 if twin.signed else 0
    twin.quant_max = 127 if twin.signed else 255
    place(region, path, twin)
    with region.graph.inserting_after(node):
        again = region.graph.call_module(path, (node,))
    again.meta = dict(node.meta)
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def _separate_calls(region: CapturedModule, exported: list[ExportedQuantizer]) -> None:
    """Give every tensor of a shared quantizer a quantizer of its own, so that each has its own name in a file."""
    calls: dict[int, int] = {}
    for node in region.graph.nodes:
        if node.op != "call_module" or not isinstance(quantizer := module_of(node), ExportedQuantizer):
            continue
        count = calls[quantizer.number] = calls.get(quantizer.number, 0) + 1
        if count > 1:
            twin = twin_of(quantizer, f"{quantizer.name}_call_{count}", exported)
            node.target = f"{node.target}_call_{count}"
            place(region, node.target, twin)
    region.recompile()
