"""The cost of a plan: bits over the multiply-accumulates, bits that are moved, bits of the weights, and time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from halfeven.graph.cost import elements, multiply_accumulates
from halfeven.graph.layer_shapes import weight_shape
from halfeven.graph.operators import WEIGHTED, OperatorKind
from halfeven.graph.view import kind_of
from halfeven.placement.insertion import plan_of
from halfeven.placement.make_plan import named_nodes
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Mode, Quantizer
from halfeven.verification.layer_times import LayerTimes

FLOAT_BITS = 32
"""Bits of a float operand."""

BOPS_PER_BIT = 128
"""Bits times bits that are multiplied in the time in which a bit of an activation is written or read: processors
multiply about 16 pairs of bytes while they move a byte through their second cache."""

Widths = Mapping[str, int | None]
"""Bits by the quantizer's name; None: float."""


@dataclass(frozen=True)
class LayerWork:
    """The work of a layer or of a product of activations."""

    name: str
    multiply_accumulates: int
    elements: int
    """Number of weights; 0 for a product of activations."""
    weight: str | None
    """Name of the weight's quantizer."""
    inputs: tuple[str, ...]
    """Names of the quantizers of the activations that it reads."""

    def bits(self, widths: Widths) -> tuple[int, int]:
        """Return the bits of both operands. A layer with an operand in float computes in float."""
        read = [widths.get(name) for name in self.inputs]
        if self.weight is None:
            # A product of two activations; an operand without a quantizer is in float.
            first, second = (*read, None, None)[:2]
        else:
            first, second = widths.get(self.weight), next(iter(read), None)
        return (FLOAT_BITS, FLOAT_BITS) if first is None or second is None else (first, second)


@dataclass(frozen=True)
class Traffic:
    """An activation that is written once and read by each of its readers."""

    name: str
    """Name of its quantizer."""
    elements: int
    """Number of values that are written and read."""

    def bits(self, widths: Widths) -> int:
        """Return the bits that are moved."""
        return self.elements * (widths.get(self.name) or FLOAT_BITS)


@dataclass(frozen=True)
class Workload:
    """All that a quantized model multiplies, and the activations that it moves."""

    works: tuple[LayerWork, ...]
    traffic: tuple[Traffic, ...]


@dataclass(frozen=True)
class Cost:
    """The cost of a plan."""

    bits: float
    """Mean bits of both operands over the multiply-accumulates."""
    bops: float
    """Sum of bits times bits over the multiply-accumulates."""
    moved: float
    """Bits of activations that are written and read."""
    size: float
    """Bytes of the layers' weights."""
    tensors: int
    """Activations that have left the bits of the scheme."""
    latency: float | None = None
    """Estimated time, over the float file's in the runtime's default precision; None where it was not measured."""

    @property
    def work(self) -> float:
        """Return BOPs plus the bits that are moved, in BOPs: so a tensor that no layer multiplies has a price, too."""
        return self.bops + BOPS_PER_BIT * self.moved


def workload_of(qmodel: nn.Module) -> Workload:
    """Return the products and the traffic of a quantized model."""
    known = named_nodes(qmodel)
    traffic = []
    for tensor in plan_of(qmodel).tensors:
        values = sum(elements(known[place][1]) for place in tensor.places if place in known)
        # Written once, and read by each consumer.
        traffic.append(Traffic(tensor.quantizer_name, values * (1 + len(tensor.consumers))))
    return Workload(tuple(works_of(qmodel)), tuple(traffic))


def works_of(qmodel: nn.Module) -> list[LayerWork]:
    """Return the work of each layer with a quantized weight and of each product of quantized activations."""
    plan = plan_of(qmodel)
    read: dict[str, list[str]] = {}
    for tensor in plan.tensors:
        for name in tensor.consumers:
            read.setdefault(name, []).append(tensor.quantizer_name)
    weights = {weight.name: weight.quantizer_name for weight in plan.weights}
    found = []
    for name, (_, node) in named_nodes(qmodel).items():
        layer = kind_of(node) in WEIGHTED and name in weights
        if layer or (kind_of(node) is OperatorKind.MATMUL and name in read):
            count = math.prod(weight_shape(node)) if layer else 0
            weight = weights[name] if layer else None
            found.append(LayerWork(name, multiply_accumulates(node), count, weight, tuple(read.get(name, ()))))
    return found


def widths_of(qmodel: nn.Module) -> dict[str, int | None]:
    """Return the bits of each quantizer by its name; None for those that are switched off."""
    return {q.name: _bits_in_use(q) for q in quantizers(qmodel).values()}


def _bits_in_use(quantizer: Quantizer) -> int | None:
    return None if quantizer.mode is Mode.FLOAT else quantizer.scheme.bits


def cost_of(workload: Workload, widths: Widths, scheme: Widths, times: LayerTimes | None) -> Cost:
    """Return the cost of a plan.

    Args:
        workload: of the model.
        widths: the plan's bits.
        scheme: the bits of the plan without any step.
        times: times of the layers in integers and in float, where they were measured.
    """
    works = workload.works
    total = sum(work.multiply_accumulates for work in works) or 1
    pairs = [(work, *work.bits(widths)) for work in works]
    # A quantizer that is off has None for bits: its tensor is stored in float.
    weights = [(work.elements, widths.get(work.weight) or FLOAT_BITS) for work in works if work.weight is not None]
    # `PlannedWeight.quantizer_name` begins so.
    activations = {name for name in scheme if not name.startswith("the weight of ")}
    floats = [work.name for work, first, _ in pairs if first == FLOAT_BITS]
    # The time outside of layers follows the traffic, from all at the scheme's bits to all in float.
    moved, least, most = (_moved_bits(workload, given) for given in (widths, scheme, {}))
    return Cost(
        bits=sum(work.multiply_accumulates * (first + second) / 2 for work, first, second in pairs) / total,
        bops=float(sum(work.multiply_accumulates * first * second for work, first, second in pairs)),
        moved=moved,
        size=sum(count * bits / 8 for count, bits in weights),
        tensors=sum(widths.get(name) != scheme[name] for name in activations),
        latency=None if times is None else times.ratio_with(floats, (moved - least) / max(most - least, 1.0)),
    )


def _moved_bits(workload: Workload, widths: Widths) -> float:
    return float(sum(traffic.bits(widths) for traffic in workload.traffic))
