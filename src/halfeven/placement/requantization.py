"""Apply new rules to a quantized model: quantizers that the new plan changes are replaced, all others stay."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx, nn

from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, operations
from halfeven.placement.folded_batchnorm import unfold_live
from halfeven.placement.frozen import freeze_scales
from halfeven.placement.insertion import (
    insert_tensor,
    insert_weight,
    place_quantizer,
    plan_of,
    quantizer_path,
    settle_regions,
    tensor_quantizer,
    weight_quantizer,
)
from halfeven.placement.make_plan import named_nodes, regions
from halfeven.placement.options import QuantizationOptions, Rule
from halfeven.placement.plan import Plan, PlannedTensor, PlannedWeight
from halfeven.placement.quantized_layers import FLOAT_LAYERS
from halfeven.quantization.quantizer import Quantizer
from halfeven.targets.target import Target

Found = Mapping[str, tuple[CapturedModule, fx.Node]]
Planned = TypeVar("Planned", PlannedWeight, PlannedTensor)


def apply_rules(qmodel: nn.Module, rules: Sequence[Rule], target: Target) -> tuple[str, ...]:
    """Change a quantized model, in place, to its plan with further rules.

    Quantizers that both plans describe alike stay, with their ranges.

    Args:
        qmodel: a model from `prepare` or `load`.
        rules: the further rules, which win over those of the model's plan.
        target: the runtime of the model's plan.

    Returns:
        Names of the new quantizers without a range: all except those whose range the plan fixes.

    Raises:
        PlacementError: a rule holds for nothing, or the target cannot do its bits; the model is unchanged.
    """
    return apply_plan(qmodel, plan_of(qmodel).with_rules(*rules), target)


def apply_plan(qmodel: nn.Module, after: Plan, target: Target) -> tuple[str, ...]:
    """Change a quantized model, in place, to another plan of its own graph.

    Args:
        qmodel: a model from `prepare` or `load`.
        after: what the model's plan becomes, made by its `decide`.
        target: the runtime of both plans.

    Returns:
        Names of the new quantizers without a range.
    """
    # Entries of both plans are compared by what they quantize: the name of a layer, or the places that share a
    # quantizer.
    before = plan_of(qmodel)
    change = _Change(named_nodes(qmodel), after.options)
    weights = _replace_quantizers(
        {weight.name: weight for weight in before.weights},
        {weight.name: weight for weight in after.weights},
        remove=change.remove_weight,
        exchange=change.exchange_weight,
        insert=change.insert_weight,
    )
    tensors = _replace_quantizers(
        {tensor.places: tensor for tensor in before.tensors},
        {tensor.places: tensor for tensor in after.tensors},
        remove=change.remove_tensor,
        exchange=change.exchange_tensor,
        insert=change.insert_tensor,
    )
    new = weights + tensors
    settle_regions(qmodel, after, target)
    for region in regions(qmodel).values():
        freeze_scales(region, new)
    return tuple(quantizer.name for quantizer in new if not quantizer.state.has_range)


@dataclass(frozen=True)
class _Change:
    """A change of the quantizers of a model, whose nodes are found by name."""

    found: Found
    options: QuantizationOptions

    def insert_weight(self, planned: PlannedWeight) -> Quantizer:
        """Make a layer read its weight through a new quantizer, and return it."""
        return insert_weight(*self.found[planned.name], planned, self.options)

    def insert_tensor(self, planned: PlannedTensor) -> Quantizer:
        """Make all readers of an activation read it through a new quantizer, and return it."""
        return insert_tensor([self.found[name] for name in planned.places], planned, self.options)

    def exchange_weight(self, planned: PlannedWeight) -> Quantizer:
        """Give a layer's weight a new quantizer, and return it."""
        region, node = self.found[planned.name]
        quantizer = weight_quantizer(planned, self.options)
        if not Op(node).is_module:
            place_quantizer(region, quantizer, f"{planned.name}_weight")
            return quantizer
        layer = Op(node).module
        layer.weight_quantizer = quantizer.to(layer.weight.device).train(region.training)
        return quantizer

    def exchange_tensor(self, planned: PlannedTensor) -> Quantizer:
        """Give an activation a new quantizer at all its places, and return it."""
        region, _ = self.found[planned.places[0]]
        quantizer = tensor_quantizer(planned, self.options)
        # At the same path, so that the calls in the graph call the new quantizer.
        place_quantizer(region, quantizer, planned.name)
        return quantizer

    def remove_weight(self, planned: PlannedWeight) -> None:
        """Remove the quantizer of a layer's weight: the layer computes in float."""
        region, node = self.found[planned.name]
        if not Op(node).is_module:
            _remove_calls(region, quantizer_path(f"{planned.name}_weight"))
            return
        layer = Op(node).module
        # First, while the layer still has its links to the BatchNorm that is folded into it.
        unfold_live(layer)
        del layer.weight_quantizer
        layer.input_quantizers = ()
        layer.__class__ = FLOAT_LAYERS[type(layer)]

    def remove_tensor(self, planned: PlannedTensor) -> None:
        """Remove the quantizer of an activation at all its places."""
        _remove_calls(self.found[planned.places[0]][0], quantizer_path(planned.name))


def _replace_quantizers(
    old: Mapping[Any, Planned],
    new: Mapping[Any, Planned],
    *,
    remove: Callable[[Planned], None],
    exchange: Callable[[Planned], Quantizer],
    insert: Callable[[Planned], Quantizer],
) -> list[Quantizer]:
    """Remove, exchange and insert quantizers, and return the new quantizers.

    Args:
        old, new: the entries of the plans before and after, by what they quantize.
        remove: takes a quantizer of `old` away.
        exchange: gives a place that has a quantizer another.
        insert: gives a place that has none a quantizer.
    """
    # Removals come first: where tensors are grouped anew, the new quantizer may get the path of an old one.
    for place in old.keys() - new.keys():
        remove(old[place])
    exchanged = [
        exchange(planned)
        for place, planned in new.items()
        if place in old and _quantizer_of(planned) != _quantizer_of(old[place])
    ]
    return exchanged + [insert(planned) for place, planned in new.items() if place not in old]


def _quantizer_of(planned: PlannedTensor | PlannedWeight) -> tuple[object, ...]:
    """Return the fields that define a quantizer: all except the readers of a tensor.

    A class of the user's counts with its code: a quantizer that was read from a file lacks it, and needs it to
    calibrate.
    """
    fixed = planned.fixed_range if isinstance(planned, PlannedTensor) else planned.channels
    own = [getattr(value, "implementation", None) for value in (planned.observer, planned.quantizer)]
    return planned.name, planned.scheme, planned.ranges, planned.observer, planned.quantizer, fixed, *own


def _remove_calls(region: CapturedModule, path: str) -> None:
    """Remove a quantizer from a graph; its readers then read the tensor itself."""
    for op in operations(region.graph):
        if op.is_module and op.path == path:
            op.node.replace_all_uses_with(op.inputs[0].node)
            region.graph.erase_node(op.node)
    region.delete_submodule(path)
