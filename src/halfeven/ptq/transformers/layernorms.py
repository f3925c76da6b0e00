"""LayerNorms with the linear layers that read them, into whose weights factors and offsets of channels can move."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import Op
from halfeven.layerwise.calibrate import run_batches
from halfeven.layerwise.float_equivalence import float_function
from halfeven.placement import channel_affine
from halfeven.placement.channel_affine import ChannelAffine
from halfeven.placement.graph_edits import record_changes
from halfeven.placement.make_plan import named_nodes
from halfeven.ptq.equalization.layer_pairs import rewritable_layers
from halfeven.quantization.observers import make_observer
from halfeven.quantization.quantizer import Quantizer
from halfeven.quantization.scheme import Scheme

DEAD_CHANNEL_RATIO = 1e-6
"""A channel with a range below this fraction of the largest stays as it is: its factor would be rounding noise."""


# The mathematics


def live_channels(extent: Tensor) -> Tensor:
    """Return a mask, [channels], of the channels with a finite range that is not negligible."""
    finite = torch.where(torch.isfinite(extent), extent, 0.0)
    return torch.isfinite(extent) & (finite > DEAD_CHANNEL_RATIO * finite.amax())


def move_affine(
    norm: nn.LayerNorm, linears: Iterable[nn.Linear], rescaling: ChannelAffine | None, r: Tensor, c: Tensor
) -> None:
    """Move X = r X' + c out of a LayerNorm and into its readers, in place.

    gamma' = gamma / r, beta' = (beta - c) / r, W' = W r, b' = b + W c.

    Args:
        norm: puts out X before and X' afterwards.
        linears: layers that read it.
        rescaling: gives X to the additions that read it; None where there are none.
        r: positive factors, [channels], float64.
        c: offsets, [channels], float64.
    """
    # f x + o with x = r x' + c is (f r) x' + (f c + o): several moves add up in one pair of factor and offset.
    if rescaling is not None:
        factor = rescaling.factor.double()
        rescaling.offset.copy_(rescaling.offset.double() + factor * c)
        rescaling.factor.copy_(factor * r)
    for layer in linears:
        weight = layer.weight.double()
        if layer.bias is not None:
            # The bias before the weight: W c needs W as it was.
            layer.bias.copy_(layer.bias.double() + weight @ c)
        # [outputs, inputs] * [inputs]: a factor for each input channel.
        layer.weight.copy_(weight * r)
    if norm.bias is not None:
        norm.bias.copy_((norm.bias.double() - c) / r)
    norm.weight.copy_(norm.weight.double() / r)


def range_spread(extent: Tensor) -> float:
    """Return the largest over the mean range of channels, [channels]; 1 where all are 0."""
    return float(extent.amax() / extent.mean()) if bool(extent.any()) else 1.0


# Finding the groups


@dataclass(frozen=True)
class LayerNormGroup:
    """A LayerNorm and the linear layers that read it."""

    name: str
    norm: nn.LayerNorm
    linear_names: tuple[str, ...]
    linears: tuple[nn.Linear, ...]
    read_by_additions: bool
    """Additions read it too, as in the residual stream of a transformer with its LayerNorms last (BERT)."""

    @property
    def offset(self) -> Tensor | None:
        """The LayerNorm's beta, [channels]; None where it has none."""
        return self.norm.bias


def layernorm_groups(qmodel: nn.Module) -> tuple[list[LayerNormGroup], tuple[str, ...]]:
    """Return the LayerNorms whose factor and offset can move, in the order of the graph, and the rest with reasons."""
    rewritable, _ = rewritable_layers(qmodel)
    layers = {Op(node): name for name, node in rewritable.items()}
    ops = {name: Op(node) for name, (_, node) in named_nodes(qmodel).items()}
    # By identity: a module may be called from several places, and a parameter have several names.
    calls = Counter(id(op.module) for op in ops.values() if op.is_module)
    owners = Counter(id(p) for _, p in qmodel.named_parameters(remove_duplicate=False))
    groups: list[LayerNormGroup] = []
    left: list[str] = []
    for name, op in ops.items():
        if op.kind is not OperatorKind.NORMALIZATION:
            continue
        readers = list(_final_readers(op))
        linears = [reader for reader in readers if reader in layers]
        others = [reader for reader in readers if reader not in layers]
        if reason := _obstacle_to_moving(op, linears, others, calls, owners):
            left.append(f"{name} ({reason})")
        elif linears:
            norm: Any = op.module
            modules: Any = tuple(linear.module for linear in linears)
            names = tuple(layers[linear] for linear in linears)
            groups.append(LayerNormGroup(name, norm, names, modules, read_by_additions=bool(others)))
    return groups, tuple(left)


def _obstacle_to_moving(
    op: Op, linears: list[Op], others: list[Op], calls: Counter[int], owners: Counter[int]
) -> str | None:
    """Return why nothing can move out of a normalization; None where nothing stands in the way."""
    norm = op.module
    # Over several axes there is a factor for each element, and a linear layer has one for each input channel.
    if not isinstance(norm, nn.LayerNorm) or len(norm.normalized_shape) != 1:
        return "no LayerNorm over the last axis with a factor of its own"
    if others and not (linears and _are_additions(op, others)):
        return f"read by {', '.join(dict.fromkeys(end.name for end in others))}"
    if calls[id(norm)] > 1 or any(owners[id(p)] > 1 for p in norm.parameters()):
        return "used more than once"
    return None


def _are_additions(op: Op, others: list[Op]) -> bool:
    """Return True where these readers are additions that read the tensor directly, so that they can be given X."""
    direct = {Op(node) for node in channel_affine.readers(op.node)}
    return all(
        end in direct and (isinstance(end.module, ChannelAffine) or end.kind is OperatorKind.ADD) for end in others
    )


def _final_readers(op: Op) -> Iterator[Op]:
    """Return the readers of a tensor past all operators that keep its channels apart: linear layers and others."""
    for reader in op.readers:
        if _keeps_channels(reader):
            yield from _final_readers(reader)
        else:
            yield reader


def _keeps_channels(op: Op) -> bool:
    """Return True for an operator that keeps the last axis and commutes with X = r X' + c of each channel."""
    module = op.module
    if module is not None:
        if isinstance(module, nn.Dropout):
            return module.p == 0  # a dropped value becomes 0 in X, but c in r X' + c
        if isinstance(module, Quantizer):
            return module.scheme.axis is None
    return op.passes_features


# What the algorithms share


@dataclass(frozen=True)
class LayerNormReport:
    """Result of `smooth` or `reparametrize`."""

    method: str
    spread: dict[str, tuple[float, float]]
    """LayerNorm -> largest over mean range of its output channels, before and after."""
    readers: dict[str, tuple[str, ...]]
    """LayerNorm -> linear layers that took over its factors."""
    left: tuple[str, ...] = ()
    """LayerNorms that were left alone, with the reason."""

    def __str__(self) -> str:
        if not self.spread:
            lines = [f"{self.method}: no LayerNorm is read by linear layers, so nothing was changed."]
        else:
            lines = [
                f"{self.method}: {len(self.spread)} LayerNorms. Ranges must be set again.",
                "  largest / mean channel range of an activation:",
                *(
                    f"    {name} -> {', '.join(self.readers[name])}: {before:.1f} -> {after:.1f}"
                    for name, (before, after) in self.spread.items()
                ),
            ]
        return "\n".join(lines + [f"  left alone: {name}" for name in self.left])


def give_rescalings(qmodel: nn.Module, groups: list[LayerNormGroup]) -> list[ChannelAffine | None]:
    """Give the additions that read a LayerNorm a `ChannelAffine` in between, recorded in the plan, and return it.

    Returns:
        An entry for each group; None where no addition reads its LayerNorm.
    """
    # Through the plan, so that a loaded checkpoint has the same rescalings; then each is found in its graph.
    record_changes(qmodel, rescaled=tuple(group.name for group in groups if group.read_by_additions))
    nodes = named_nodes(qmodel)
    return [channel_affine.rescaling_of(nodes[group.name][1]) for group in groups]


def channel_ranges(
    qmodel: nn.Module, groups: list[LayerNormGroup], loader: Iterable[Any], observer: str, batches: int | None
) -> list[tuple[Tensor, Tensor]]:
    """Return the ranges of each LayerNorm's output channels in the float model, (low, high), [channels] each.

    Args:
        qmodel: a model from `prepare`.
        groups: from `layernorm_groups`.
        loader: batches, as for `calibrate`; it is not read where there are no groups.
        observer: name of the range estimator.
        batches: largest number of batches to read; None: all.

    Raises:
        CalibrationError: the loader is empty, or a batch gave NaN or infinity.
    """
    if not groups:
        return []
    # Axis 0: an observer takes [channels, ...], and the hook moves the last axis there.
    observers = [make_observer(observer, Scheme(axis=0)) for _ in groups]
    hooks = [
        group.norm.register_forward_hook(lambda module, inputs, output, seen=seen: seen.update(output.movedim(-1, 0)))
        for group, seen in zip(groups, observers, strict=True)
    ]
    try:
        with float_function(qmodel):
            run_batches(qmodel, loader, batches)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen.range() for seen in observers]
