"""Name the cause of a harmful tensor, from what was measured of it and from the remedies that helped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn

from halfeven.diagnosis.operator_groups import integer_operators
from halfeven.diagnosis.statistics import TensorStatistics
from halfeven.graph.operators import TRANSPARENT, WEIGHTED, OperatorKind
from halfeven.graph.view import Op
from halfeven.placement.make_plan import named_nodes
from halfeven.placement.plan import PlannedTensor, PlannedWeight

UNLIKE_RANGE_RATIO = 8.0
"""Ranges of tensors or channels that share a scale differ by this factor before it is called the cause: 3 of 8 bits."""
QUIET_SAMPLE_RATIO = 30.0
"""The loudest sample over a quiet one, from where 8 bits leave the quiet one few levels."""
FEW_CHANNELS = 0.1
"""Largest share of channels that are outliers among the rest."""
FRONT_END = "a front end inside of the model"
NORMALIZATIONS = {"rms_norm": "RMSNorm", "instance_norm": "InstanceNorm"}
"""Names of normalizations that are no modules, by the names of their operators."""
NORMALIZING_FACTORS = ("rsqrt", "reciprocal")
"""Operators whose results a normalization that is written out multiplies by."""
LOGARITHMS = ("log", "log2", "log10", "log1p")
"""Operators that make errors of small values as large as those of large ones."""


@dataclass(frozen=True)
class Suspect:
    """A harmful tensor, and all that is known of it."""

    qmodel: nn.Module
    planned: PlannedTensor | PlannedWeight
    found: TensorStatistics
    observer_helps: str = ""
    """The estimator that repairs it; "" if none does."""
    read: "Suspect | None" = None
    """The activation that a weight's layer reads, if it is quantized."""

    @property
    def input_channel_spread(self) -> float:
        """Return the largest weight for any channel of the layer's input over the largest for the least channel.

        1 for an activation, and for a layer whose channels are grouped.
        """
        if not isinstance(self.planned, PlannedWeight):
            return 1.0
        op = Op(named_nodes(self.qmodel)[self.planned.name][1])
        weight = _weight_of(op)
        if weight is None or weight.ndim < 2 or getattr(op.module, "groups", 1) != 1:
            return 1.0
        # A transposed convolution's weight is [inputs, outputs, ...], any other layer's [outputs, inputs, ...].
        axis = 0 if getattr(op.module, "transposed", False) else 1
        largest = weight.detach().transpose(0, axis).flatten(1).abs().amax(1)
        # Weights of a dead input say nothing about scales.
        live = largest[largest > 1e-8 * largest.max()]
        return float(live.max() / live.min()) if len(live) > 1 else 1.0

    @property
    def tensor(self) -> str:
        """Return the tensor's name in texts."""
        if isinstance(self.planned, PlannedWeight):
            return self.planned.quantizer_name
        return " and ".join(self.planned.places[:3]) + (" and more" if len(self.planned.places) > 3 else "")


@dataclass(frozen=True)
class Cause:
    """A cause in a few words, and the numbers that show it."""

    name: str
    evidence: str


def cause_of(suspect: Suspect) -> Cause:
    """Return the first cause that the numbers show."""
    # The last of them is found of any tensor, so that there always is a cause.
    return next(cause for find in KNOWN_CAUSES if (cause := find(suspect)) is not None)


def shared_cause_of(suspects: Sequence[Suspect]) -> Cause | None:
    """Return the first cause that the numbers of any of several tensors show, other than too few bits; None if none."""
    finds = [find for find in KNOWN_CAUSES if find not in CAUSES_OF_ANY_TENSOR]
    return next((cause for find in finds for suspect in suspects if (cause := find(suspect)) is not None), None)


def _unlike_tensors_share_range(suspect: Suspect) -> Cause | None:
    if isinstance(suspect.planned, PlannedWeight):
        return None
    # A tensor of zeros alone, as of a dead branch, loses nothing in any range.
    largest = {
        name: place.largest
        for name, place in zip(suspect.planned.places, suspect.found.places, strict=True)
        if place.largest > 0
    }
    if len(largest) < 2 or max(largest.values()) < UNLIKE_RANGE_RATIO * min(largest.values()):
        return None
    sizes = ", ".join(f"{name} ±{size:.3g}" for name, size in list(largest.items())[:4])
    # With one scale, a tensor uses as large a share of the levels as its range is of the largest.
    levels = suspect.found.quantizer.scheme.levels * min(largest.values()) / max(largest.values())
    return Cause(
        "tensors of unlike sizes share one range",
        f"They are concatenated, so one scale serves all: {sizes}. The smallest has {levels:.1f} levels.",
    )


def _mask_widens_range(suspect: Suspect) -> Cause | None:
    share = suspect.found.far_share()
    if suspect.found.quantizer.weight or not share or not suspect.found.far_is_constant():
        return None
    if _maker(suspect).kind in (OperatorKind.NORMALIZATION, *WEIGHTED):
        return None  # a large bias of a channel, which nothing is added to
    values = suspect.found.sample
    # The same half of the largest magnitude as `FAR_SHARE` of the statistics.
    far = values.abs() >= 0.5 * values.abs().max()
    return Cause(
        "an additive mask sets the range",
        f"{share:.1%} of the values are about {float(values[far].mean()):.3g}, all others within "
        f"±{float(values[~far].abs().max()) if bool((~far).any()) else 0.0:.3g}.",
    )


def _unlike_weight_channels(suspect: Suspect) -> Cause | None:
    spread = suspect.found.channel_spread()
    if not suspect.found.quantizer.weight or suspect.found.quantizer.scheme.axis is not None or spread is None:
        return None
    if spread[1] < UNLIKE_RANGE_RATIO:
        return None
    worst = ", ".join(f"{channel} ({sqnr:.0f} dB)" for channel, sqnr in suspect.found.worst_channels())
    return Cause(
        "badly scaled channels share one scale",
        f"{_channel_sizes(suspect.found, spread)}, and the weight has one scale for all. Worst channels: {worst}.",
    )


def _channel_sizes(found: TensorStatistics, spread: tuple[int, float]) -> str:
    """Say how unlike the channels of a tensor are; `spread` is its `channel_spread()`."""
    outlier = found.channel_outlier()
    if outlier is not None and outlier[2] >= UNLIKE_RANGE_RATIO:
        _, channel, ratio = outlier
        return f"Channel {channel} has {ratio:.3g} times the range of the median channel"
    # Two channels have no median, where most are dead it is 0, and where a few are small it is as the largest.
    axis, ratio = spread
    channel = int(found.channel_largest[axis].argmax())
    return f"Channel {channel} has {ratio:.3g} times the range of the smallest channel that is not dead"


def _unlike_input_channels(suspect: Suspect) -> Cause | None:
    """Return why a layer's weights for some channels of its input are far smaller than for the rest.

    They make up for the sizes of what the layer reads, so the cause is sought there.
    """
    ratio = suspect.input_channel_spread
    if ratio < UNLIKE_RANGE_RATIO:
        return None
    finds = (_unlike_tensors_share_range, _mask_widens_range, _outlier_channel)
    causes = (find(suspect.read) for find in finds) if suspect.read is not None else ()
    cause = next((cause for cause in causes if cause is not None), None)
    weights = f"its weights for some channels of its input are {ratio:.3g} times smaller than for the largest"
    if cause is None or suspect.read is None:
        vanished = f"{suspect.found.vanished_share:.0%} of them become 0"
        return Cause(
            "badly scaled input channels share one scale", f"The layer scales its inputs: {weights}; {vanished}."
        )
    return Cause(cause.name, f"{suspect.read.tensor}: {cause.evidence} The layer behind makes up for it: {weights}.")


def _outlier_channel(suspect: Suspect) -> Cause | None:
    outlier = suspect.found.channel_outlier()
    if suspect.found.quantizer.weight or outlier is None or outlier[2] < UNLIKE_RANGE_RATIO:
        return None
    axis, channel, ratio = outlier
    largest = suspect.found.channel_largest[axis]
    # A single channel always counts as few, however few channels there are.
    if float((largest > 0.5 * largest.max()).double().mean()) > max(FEW_CHANNELS, 1.5 / len(largest)):
        return None
    if maker := _maker_with_unlike_rows(suspect, channel):
        return Cause(
            "badly scaled channels share one scale",
            f"Channel {channel} reaches ±{float(largest.max()):.3g}, {ratio:.0f} times the median channel, as in the "
            f"weight of {maker}, which makes it and has one scale for all.",
        )
    behind = _normalization_before(suspect)
    return Cause(
        f"an outlier channel{f' after {behind}' if behind else ''}",
        f"Channel {channel} of axis {axis} reaches ±{float(largest.max()):.3g}, {ratio:.0f} times the median channel; "
        f"{suspect.found.vanished_share:.0%} of the values become 0.",
    )


def _unfit_observer(suspect: Suspect) -> Cause | None:
    if not suspect.observer_helps:
        return None
    low, high = suspect.found.bounds
    seen = max(place.largest for place in suspect.found.places)
    # A range that ends well below the largest value clips; any other was widened by rare values.
    narrow = max(abs(low), abs(high)) < 0.8 * seen
    if suspect.found.quantizer.weight and (far := suspect.found.far_share()):
        return Cause("a few extreme weights set the range", f"{far:.2%} of the weights are far larger than the rest.")
    if suspect.found.quantizer.weight:
        better = f'The estimator "{suspect.observer_helps}" fits it better.'
        return Cause("the weight's range is badly estimated", better)
    return Cause(
        "the range clips values that matter" if narrow else "rare values make the range too wide",
        f"The range is {low:.3g} to {high:.3g}, values reach ±{seen:.3g}; {suspect.found.clipped_share:.2%} are "
        "clipped.",
    )


def _untrained_front_end(suspect: Suspect) -> Cause | None:
    readers = _reader_names(suspect.planned)
    operators = integer_operators(suspect.qmodel)
    # A front end stands at the beginning: the same numbers further back have other causes.
    early = operators[: max(len(operators) // 3, 1)]
    if not any(reader in early for reader in readers):
        return None
    untrained = [name for name in readers if name in operators and _has_untrained_weight(suspect.qmodel, name)]
    behind = _nonlinear_behind(suspect.qmodel, readers)
    if not untrained and not behind:
        return None
    why = f"the weight of {untrained[0]} is not trained" if untrained else ""
    why += (" and " if why and behind else "") + (f"{', '.join(behind)} follows" if behind else "")
    spread = suspect.found.sample_spread()
    loud = f" The loudest sample is {spread:.0f} times a quiet one." if spread >= QUIET_SAMPLE_RATIO else ""
    return Cause(FRONT_END, f"At {readers[0]}, {why}.{loud}")


def _wide_dynamic_range(suspect: Suspect) -> Cause | None:
    spread = suspect.found.sample_spread()
    if spread < QUIET_SAMPLE_RATIO and suspect.found.vanished_share < 0.5:
        return None
    return Cause(
        "the values span more than the bits can",
        f"The largest sample is {spread:.0f} times a small one, and {suspect.found.vanished_share:.0%} of the values "
        "become 0.",
    )


def _few_bits(suspect: Suspect) -> Cause | None:
    bits = suspect.planned.scheme.bits
    if bits >= 8:
        return None
    return Cause(f"{bits} bits are too few", f"{suspect.found.sqnr:.1f} dB at the tensor.")


def _more_than_8_bits_needed(suspect: Suspect) -> Cause:
    return Cause(
        "this tensor needs more than 8 bits",
        f"{suspect.found.sqnr:.1f} dB at the tensor, {suspect.found.vanished_share:.0%} of the values become 0.",
    )


KNOWN_CAUSES: tuple[Callable[[Suspect], Cause | None], ...] = (
    _unlike_tensors_share_range,
    _mask_widens_range,
    _unlike_weight_channels,
    _untrained_front_end,
    _outlier_channel,
    _unlike_input_channels,
    _unfit_observer,
    _wide_dynamic_range,
    _few_bits,
    _more_than_8_bits_needed,
)
"""The causes, in the order in which they are looked for."""
CAUSES_OF_ANY_TENSOR = (_unfit_observer, _wide_dynamic_range, _few_bits, _more_than_8_bits_needed)
"""The causes that numbers of almost any tensor show, where it is known to do the damage."""


def _reader_names(planned: PlannedTensor | PlannedWeight) -> list[str]:
    return [planned.name] if isinstance(planned, PlannedWeight) else list(planned.consumers)


def _normalization_before(suspect: Suspect) -> str:
    """Return the name of the normalization that makes the tensor; "" if another operator does."""
    assert isinstance(suspect.planned, PlannedTensor)
    op = Op(named_nodes(suspect.qmodel)[suspect.planned.places[0]][1])
    while True:
        if op.kind is OperatorKind.NORMALIZATION or op.name in NORMALIZATIONS:
            return NORMALIZATIONS.get(op.name, op.name)
        computed = [read for read in op.inputs if not read.is_constant]
        if op.kind is OperatorKind.MULTIPLY and any(read.name in NORMALIZING_FACTORS for read in computed):
            return "a normalization"
        if op.kind not in (OperatorKind.MULTIPLY, OperatorKind.AVERAGE, *TRANSPARENT) or len(computed) != 1:
            return ""
        op = computed[0]


def _maker(suspect: Suspect) -> Op:
    """Return the operator that computes an activation, before BatchNorm, activation functions and moves."""
    assert isinstance(suspect.planned, PlannedTensor)
    op = Op(named_nodes(suspect.qmodel)[suspect.planned.places[0]][1])
    while op.kind in (OperatorKind.ACTIVATION, OperatorKind.BATCH_NORM, *TRANSPARENT) and op.inputs:
        op = op.inputs[0]
    return op


def _maker_with_unlike_rows(suspect: Suspect, channel: int) -> str:
    """Return the layer that makes a channel far larger than the rest by a weight with one scale; "" if none does."""
    op = _maker(suspect)
    if op.kind not in WEIGHTED or not op.is_module:
        return ""
    quantizer = getattr(op.module, "weight_quantizer", None)
    # Outputs first, also of a transposed convolution.
    rows = op.module.weight.detach().transpose(0, 1 if getattr(op.module, "transposed", False) else 0)
    largest = rows.flatten(1).abs().amax(1)
    if quantizer is None or quantizer.scheme.axis is not None or channel >= len(largest):
        return ""
    return op.path if float(largest[channel]) >= UNLIKE_RANGE_RATIO * float(largest.median()) else ""


def _has_untrained_weight(qmodel: nn.Module, name: str) -> bool:
    """Return True for a layer whose weight is no trained parameter: a buffer, or frozen."""
    op = Op(named_nodes(qmodel)[name][1])
    # A model for inference has all its parameters frozen, which tells nothing about a single one.
    if op.kind not in WEIGHTED or not any(p.requires_grad for p in qmodel.parameters()):
        return False
    weight = _weight_of(op)
    return weight is not None and not weight.requires_grad


def _weight_of(op: Op) -> Tensor | None:
    """Return the weight of a layer, also where it is a function of a parameter; None if it is computed."""
    if op.is_module:
        weight: Tensor | None = getattr(op.module, "weight", None)
        return weight
    read = next((read for read in op.inputs[1:2]), None)
    # The weight of a function may be read through its quantizer.
    source = read.inputs[0] if read is not None and read.is_module and read.inputs else read
    return source.constant if source is not None and source.is_constant else None


def _nonlinear_behind(qmodel: nn.Module, names: list[str]) -> list[str]:
    """Return the logarithms between these and the next layers."""
    known = named_nodes(qmodel)
    waiting: list[fx.Node] = [user for name in names if name in known for user in known[name][1].users]
    seen: set[fx.Node] = set()
    found: list[str] = []
    while waiting:
        node = waiting.pop()
        op = Op(node)
        if node in seen or op.is_output or op.kind in WEIGHTED:
            continue
        seen.add(node)
        if op.is_function and op.name.removesuffix("_") in LOGARITHMS and op.name not in found:
            found.append(op.name)
        waiting += node.users
    return found
