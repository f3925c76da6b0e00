"""Bias absorption: a constant that an activation always lets through moves into the next layer's bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.3
(arXiv:1906.04721); white paper, section 3.2 (arXiv:2106.08295). Where x >= c >= 0, relu(x) = relu(x - c) + c, so that
W2 relu(W1 x + b1) + b2 is W2 relu(W1 x + b1 - c) + (b2 + W2 c): the tensor between the layers needs less range.
Equalization, which divides biases with their weights, makes large biases, so this follows it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.graph.batchnorm import keep_statistics, kept_statistics
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import Op, kind_of, module_of
from halfeven.layerwise.calibrate import run_batches
from halfeven.layerwise.float_equivalence import float_function, float_outputs, sqnr
from halfeven.placement.graph_edits import give_bias
from halfeven.ptq.equalization.layer_pairs import Link, apply_to_constant, links, rewritable_layers, weight_by_channel


def certain_part(mean: Tensor, std: Tensor, deviations: float) -> Tensor:
    """What channels with these moments nearly always exceed, at least 0: with 3 deviations, 99.87 % of a Gaussian's
    values are above."""
    return (mean - deviations * std).clamp(min=0)


@dataclass
class _Seen:
    """Smallest value and mean of each output channel of a layer over all batches, [channels]."""

    smallest: Tensor | None = None
    total: Tensor | float = 0.0
    count: int = 0

    def update(self, layer: Any, output: Tensor) -> None:
        axis = -1 if isinstance(layer, nn.Linear) else output.ndim - layer.weight.ndim + 1
        rows = output.movedim(axis, 0).flatten(1)
        smallest = rows.amin(1)
        self.smallest = smallest if self.smallest is None else torch.minimum(self.smallest, smallest)
        self.total, self.count = self.total + rows.double().sum(1), self.count + rows.shape[1]

    def constant(self, activated: bool) -> Tensor:
        assert self.smallest is not None
        return self.smallest.clamp(min=0) if activated else torch.as_tensor(self.total / self.count)


@dataclass(frozen=True, kw_only=True)
class AbsorptionReport:
    """What `absorb_biases` did."""

    absorbed: dict[str, float]
    """"layer -> next layer", with the largest constant that moved."""
    sqnr: float
    """How well the float outputs on the example stayed: signal over difference in dB; infinite where they are equal."""
    left: tuple[str, ...] = ()
    """Layers whose biases could not be absorbed, with the reason."""

    def __str__(self) -> str:
        moved = {link: constant for link, constant in self.absorbed.items() if constant}
        if not moved:
            return "Bias absorption: no channel is always above zero, so nothing was changed."
        lines = [
            f"Bias absorption: {len(moved)} of {len(self.absorbed)} links; float outputs as before to "
            f"{self.sqnr:.1f} dB. Ranges must be set anew.",
            *(f"  {link}: up to {constant:.3g}" for link, constant in moved.items()),
        ]
        return "\n".join(lines + [f"  left alone: {name}" for name in self.left])


@torch.no_grad()
def absorb_biases(
    qmodel: nn.Module,
    loader: Iterable[Any] | None = None,
    *,
    deviations: float = 3.0,
    batches: int | None = None,
    across_padding: bool = False,
) -> AbsorptionReport:
    """Move what activations always let through into the next layer's bias, in place.

    Of a channel before a ReLU that is the least value seen in the data or, without data, the mean less some standard
    deviations by the folded BatchNorm; where no activation is between the layers, it is the mean. Layers without a
    bias get one, which is recorded in the plan.

    The float function stays but for values below the constant, which are lost; a layer that pads with zeros would lack
    the constant at its borders, too. The report says how nearly it stayed. Ranges that were set before must be set
    anew.

    Args:
        qmodel: a model from `prepare` with `batchnorm="fold"`.
        loader: batches as for `calibrate`; None: go by the BatchNorm statistics.
        deviations: standard deviations below the mean, without data.
        batches: how many to take; None: all.
        across_padding: whether to absorb into layers that pad with zeros, too, as the papers do. On small images,
            which are mostly border, that costs more than it gains.

    Raises:
        CalibrationError: the loader gave no batch.
    """
    layers, left = rewritable_layers(qmodel)
    names = {node: name for name, node in layers.items()}
    refused = {link: reason for link in links(layers) if (reason := _refusal(link, loader is None, across_padding))}
    fit = [link for link in links(layers) if link not in refused]
    before = float_outputs(qmodel)
    constants = _by_statistics(fit, deviations) if loader is None else _by_data(qmodel, fit, loader, batches)
    for link, constant in constants.items():
        if constant.any():
            give_bias(qmodel, names[link.producer])
            give_bias(qmodel, names[link.consumer])
            _absorb(module_of(link.producer), module_of(link.consumer), constant)
    return AbsorptionReport(
        absorbed={f"{names[ln.producer]} -> {names[ln.consumer]}": float(c.abs().max()) for ln, c in constants.items()},
        sqnr=sqnr(float_outputs(qmodel), before),
        left=left + tuple(f"{names[link.producer]} ({reason})" for link, reason in refused.items()),
    )


def _refusal(link: Link, needs_statistics: bool, across_padding: bool) -> str | None:
    if getattr(module_of(link.consumer), "transposed", False):
        return "a transposed convolution reads it, which makes no constant of a constant"
    if needs_statistics and kept_statistics(module_of(link.producer)) is None:
        return "no BatchNorm was folded into it"
    return "its reader pads with zeros" if not across_padding and _pads(link) else None


def _pads(link: Link) -> bool:
    """Whether zeros come in between the layers: by the consumer's own padding or an operator on the way."""
    if any(Op(node).pads_zeros for node in link.between):
        return True
    layer: Any = module_of(link.consumer)
    if isinstance(layer, nn.Linear) or layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(size > 1 for size in layer.kernel_size)
    return any(layer.padding)


def _activated(link: Link) -> bool:
    return any(kind_of(node) is OperatorKind.ACTIVATION for node in link.between)


def _by_statistics(candidates: list[Link], deviations: float) -> dict[Link, Tensor]:
    constants = {}
    for link in candidates:
        kept = kept_statistics(module_of(link.producer))
        assert kept is not None
        mean, std = kept
        constants[link] = certain_part(mean, std, deviations) if _activated(link) else mean
    return constants


def _by_data(
    qmodel: nn.Module, candidates: list[Link], loader: Iterable[Any], batches: int | None
) -> dict[Link, Tensor]:
    seen = {link: _Seen() for link in candidates}
    hooks = [
        module_of(link.producer).register_forward_hook(lambda layer, _, output, one=one: one.update(layer, output))
        for link, one in seen.items()
    ]
    try:
        with float_function(qmodel):
            run_batches(qmodel, loader, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return {link: one.constant(_activated(link)) for link, one in seen.items()}


def _absorb(producer: Any, consumer: Any, constant: Tensor) -> None:
    constant = constant.to(producer.bias)
    producer.bias.sub_(constant)
    consumer.bias.add_(apply_to_constant(weight_by_channel(consumer, len(constant)), constant))
    if (kept := kept_statistics(producer)) is not None:
        mean, std = kept
        keep_statistics(producer, mean - constant.to(mean), std)
