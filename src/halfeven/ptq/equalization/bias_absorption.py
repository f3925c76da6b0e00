"""Bias absorption: a constant that an activation function always passes moves into the next layer's bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.3
(arXiv:1906.04721); white paper, section 3.2 (arXiv:2106.08295). Where x >= c >= 0, relu(x) = relu(x - c) + c, so that
W2 relu(W1 x + b1) + b2 = W2 relu(W1 x + b1 - c) + (b2 + W2 c): the tensor between the layers needs less range.
Equalization, which divides biases with their weights, makes large biases, so that this step follows it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import AlgorithmError
from halfeven.graph.batchnorm import keep_statistics, kept_statistics
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import Op, module_of
from halfeven.layerwise.calibrate import run_batches
from halfeven.layerwise.float_equivalence import example_outputs, float_function
from halfeven.layerwise.sqnr import sqnr
from halfeven.placement.graph_edits import give_bias
from halfeven.ptq.equalization.layer_pairs import (
    LayerPair,
    apply_to_constant,
    find_layer_pairs,
    rewritable_layers,
    weight_by_channel,
)

# The mathematics


def absorbable_constant(mean: Tensor, std: Tensor, deviations: float) -> Tensor:
    """Return the value that channels with these moments nearly always exceed, at least 0, [channels].

    c = max(0, mean - deviations * std); with 3 deviations, 99.87 % of a Gaussian's values exceed it.
    """
    return (mean - deviations * std).clamp(min=0)


def absorb_constant(producer: Any, consumer: Any, constant: Tensor) -> None:
    """Move a constant of each channel, [channels], from the first layer's bias into the second's, in place."""
    constant = constant.to(producer.bias)
    producer.bias.sub_(constant)
    # White paper, section 3.2: b1 - c and b2 + W2 c; W2 c sums W2 over the kernel's window.
    consumer.bias.add_(apply_to_constant(weight_by_channel(consumer, len(constant)), constant))
    if (kept := kept_statistics(producer)) is not None:
        mean, std = kept
        keep_statistics(producer, mean - constant.to(mean), std)


@dataclass
class _ChannelStatistics:
    """Smallest value and mean of each output channel of a layer over all batches, [channels]."""

    smallest: Tensor | None = None
    total: Tensor | float = 0.0
    count: int = 0

    def update(self, layer: Any, output: Tensor) -> None:
        # The output of a convolution may lack the batch axis, so its channels are counted from the end.
        axis = -1 if isinstance(layer, nn.Linear) else output.ndim - layer.weight.ndim + 1
        rows = output.movedim(axis, 0).flatten(1)  # [channels, samples * positions]
        smallest = rows.amin(1)
        self.smallest = smallest if self.smallest is None else torch.minimum(self.smallest, smallest)
        self.total = self.total + rows.double().sum(1)
        self.count += rows.shape[1]

    def constant(self, activated: bool) -> Tensor:
        assert self.smallest is not None
        # Through a ReLU only what is always above 0 passes as a constant. Without an activation function any constant
        # passes, and the mean moves the range to about 0.
        return self.smallest.clamp(min=0) if activated else torch.as_tensor(self.total / self.count)


# The walk over the model


@dataclass(frozen=True, kw_only=True)
class AbsorptionReport:
    """Result of `absorb_biases`."""

    absorbed: dict[str, float]
    """"layer -> next layer" with the largest constant that moved."""
    sqnr: float
    """SQNR in dB of the float outputs on the example against those before; infinite where they are equal."""
    left: tuple[str, ...] = ()
    """Layers whose biases could not be absorbed, with the reason."""

    def __str__(self) -> str:
        moved = {pair: constant for pair, constant in self.absorbed.items() if constant}
        if not moved:
            return "Bias absorption: no channel is always above zero, so nothing was changed."
        lines = [
            f"Bias absorption: {len(moved)} of {len(self.absorbed)} pairs of layers; float outputs as before to "
            f"{self.sqnr:.1f} dB. Ranges must be set again.",
            *(f"  {pair}: up to {constant:.3g}" for pair, constant in moved.items()),
        ]
        return "\n".join(lines + [f"  left alone: {name}" for name in self.left])


@checked_arguments(AlgorithmError)
@torch.no_grad()
def absorb_biases(
    qmodel: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    deviations: float = 3.0,
    batches: int | None = None,
    across_padding: bool = False,
) -> AbsorptionReport:
    """Move the part of each channel that activation functions always pass into the next layer's bias, in place.

    Before a ReLU that part is the smallest value seen in the data or, without data, the mean less some standard
    deviations by the folded BatchNorm. Where no activation function is between the layers, it is the mean. Layers
    without a bias get one, which is recorded in the plan.

    The float function changes for values below the constant, which are lost, and at the borders of a layer that pads
    with zeros, which lacks the constant there; the report has the SQNR. Earlier ranges must be set again.

    Args:
        qmodel: a model from `prepare` with `batchnorm="fold"`.
        loader: batches as for `calibrate`; None: use the BatchNorm statistics.
        deviations: standard deviations below the mean, without data.
        batches: largest number of batches to read; None: all.
        across_padding: absorb into layers that pad with zeros too, as the papers do. On small images, which are mostly
            border, that costs more than it gains.

    Raises:
        CalibrationError: the loader is empty.
    """
    layers, left = rewritable_layers(qmodel)
    names = {node: name for name, node in layers.items()}
    pairs = find_layer_pairs(layers)
    obstacles = {pair: _obstacle_to_absorption(pair, loader is None, across_padding) for pair in pairs}
    suitable = [pair for pair in pairs if obstacles[pair] is None]
    # All constants are found before any moves. That is right for chains of pairs too: what a layer takes over makes up
    # for what its input lost, and leaves its own outputs as they were.
    before = example_outputs(qmodel)
    if loader is None:
        constants = _constants_by_batchnorm(suitable, deviations)
    else:
        constants = _constants_by_data(qmodel, suitable, loader, batches)
    for pair, constant in constants.items():
        # Where nothing moves, no layer gets a bias, which the plan would have to record.
        if constant.any():
            give_bias(qmodel, names[pair.producer])
            give_bias(qmodel, names[pair.consumer])
            absorb_constant(module_of(pair.producer), module_of(pair.consumer), constant)
    return AbsorptionReport(
        absorbed={
            f"{names[pair.producer]} -> {names[pair.consumer]}": float(constant.abs().max())
            for pair, constant in constants.items()
        },
        sqnr=sqnr(example_outputs(qmodel), before),
        left=left + tuple(f"{names[pair.producer]} ({reason})" for pair, reason in obstacles.items() if reason),
    )


def _obstacle_to_absorption(pair: LayerPair, needs_statistics: bool, across_padding: bool) -> str | None:
    if getattr(module_of(pair.consumer), "transposed", False):
        return "a transposed convolution reads it, which makes no constant of a constant"
    if needs_statistics and kept_statistics(module_of(pair.producer)) is None:
        return "no BatchNorm was folded into it"
    return "its reader pads with zeros" if not across_padding and _has_padding_between(pair) else None


def _has_padding_between(pair: LayerPair) -> bool:
    """Return True where zeros come in between the layers: by the consumer's padding or an operator between them."""
    if any(Op(node).pads_zeros for node in pair.between):
        return True
    # torch gives the padding of a convolution as numbers or as "valid" or "same".
    layer: Any = module_of(pair.consumer)
    if isinstance(layer, nn.Linear) or layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _is_activated(pair: LayerPair) -> bool:
    return any(Op(node).kind is OperatorKind.ACTIVATION for node in pair.between)


def _constants_by_batchnorm(pairs: list[LayerPair], deviations: float) -> dict[LayerPair, Tensor]:
    constants = {}
    for pair in pairs:
        kept = kept_statistics(module_of(pair.producer))
        assert kept is not None
        mean, std = kept
        constants[pair] = absorbable_constant(mean, std, deviations) if _is_activated(pair) else mean
    return constants


def _constants_by_data(
    qmodel: nn.Module, pairs: list[LayerPair], loader: Iterable[Any], batches: int | None
) -> dict[LayerPair, Tensor]:
    """Return the constant of each pair, measured on the outputs of its first layer in float."""
    seen = {pair: _ChannelStatistics() for pair in pairs}
    hooks = [
        module_of(pair.producer).register_forward_hook(
            # Bound as a default: a closure over the loop's variable would see the last pair's statistics in every hook.
            lambda layer, _, output, statistics=statistics: statistics.update(layer, output)
        )
        for pair, statistics in seen.items()
    ]
    try:
        with float_function(qmodel):
            run_batches(qmodel, loader, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return {pair: statistics.constant(_is_activated(pair)) for pair, statistics in seen.items()}
