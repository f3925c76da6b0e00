"""Define the plan: the tensors and weights that are quantized, their schemes, and the reasons of all others.

It is decided, and can be printed, before any quantizer is inserted.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import RenderableType

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import PlacementError
from halfeven.graph.dynamic_shapes import as_dynamic_shapes
from halfeven.graph.kept_in_python import KeptInPython
from halfeven.placement.options import QuantizationOptions as QuantizationOptions
from halfeven.placement.options import Rule as Rule
from halfeven.placement.options import own_quantizer
from halfeven.placement.plan_tables import summary, whole_table
from halfeven.placement.planned import GraphChanges as GraphChanges
from halfeven.placement.planned import LeftInFloat as LeftInFloat
from halfeven.placement.planned import PlannedTensor as PlannedTensor
from halfeven.placement.planned import PlannedWeight as PlannedWeight
from halfeven.quantization.observers import own_observer
from halfeven.quantization.own_class import plain_values
from halfeven.quantization.scheme import Scheme
from halfeven.tables import WIDE, Shown, as_html, as_text


@dataclass(frozen=True)
class FoundInCapture:
    """Findings of a model's capture, for its plan."""

    notes: tuple[str, ...] = ()
    """About submodules in float and about rewritten operators."""
    kept: tuple[KeptInPython, ...] = ()
    """Modules whose own code stays Python for training."""


NOTHING_FOUND = FoundInCapture()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All decisions about a model, in the order of its graph."""

    options: QuantizationOptions
    tensors: tuple[PlannedTensor, ...]
    weights: tuple[PlannedWeight, ...]
    left: tuple[LeftInFloat, ...] = ()
    notes: tuple[str, ...] = field(default=())
    kept: tuple[KeptInPython, ...] = ()
    """Modules whose own code stays Python for what it does in training; loading a checkpoint keeps them too."""
    changes: GraphChanges = field(default=GraphChanges())
    simulated: tuple[str, ...] = ()
    """Quantized activations, by name, that rules gave more bits than the target runs: they are simulated alone."""
    decide: "Callable[[QuantizationOptions], Plan] | None" = field(default=None, repr=False, compare=False)
    """Makes the plan of the same graph for other options. Files and pickles do not contain it: a plan that is read has
    None until a model is prepared with the plan."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        """Return the plan itself: nothing in it changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the contents of a pickle: all fields except the graph to decide about, as in a file."""
        return {**vars(self), "decide": None}

    @checked_arguments(PlacementError)
    def with_rules(self, *rules: Rule) -> "Plan":
        """Return the plan with further rules, which win over the rules that the plan was made with.

        An earlier rule of the same pattern and kind is dropped if a new rule sets all of its fields.

        Raises:
            PlacementError: a rule holds for nothing, the target cannot do its bits, or the plan was read from a file.
        """
        if self.decide is None:
            raise PlacementError(
                "This plan was read from a file and has no graph, so rules cannot be added to it. Make a plan with "
                "halfeven.plan(model, example), or take halfeven.plan_of(qmodel) of a model that was prepared or "
                "loaded."
            )
        kept = [rule for rule in self.options.rules if not any(replaces(new, rule) for new in rules)]
        options = dataclasses.replace(self.options, rules=(*kept, *rules))
        return dataclasses.replace(self.decide(options), changes=self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        values = plain_values(dataclasses.replace(self, decide=None))
        del values["decide"]
        return values

    @staticmethod
    @checked_arguments(PlacementError)
    def from_dict(values: dict[str, Any]) -> "Plan":
        """Return the plan that `to_dict` wrote; lists may stand for tuples, as after a round trip through JSON."""
        # What earlier versions did not write has a default below.
        options = dict(values["options"])
        options["rules"] = tuple(Rule(**rule) for rule in options["rules"])
        options["leave_out"] = tuple(options["leave_out"])
        options["dynamic_shapes"] = as_dynamic_shapes(options.get("dynamic_shapes", {}))
        tensors = [_with_scheme(t) for t in values["tensors"]]
        for tensor in tensors:
            tensor["places"] = tuple(tensor["places"])
            tensor["consumers"] = tuple(tensor["consumers"])
            tensor["fixed_range"] = tuple(tensor["fixed_range"]) if tensor["fixed_range"] else None
        return Plan(
            options=QuantizationOptions(**options),
            tensors=tuple(PlannedTensor(**t) for t in tensors),
            weights=tuple(PlannedWeight(**_with_scheme(w)) for w in values["weights"]),
            left=tuple(LeftInFloat(**left) for left in values["left"]),
            notes=tuple(values["notes"]),
            kept=tuple(KeptInPython(**kept) for kept in values.get("kept", ())),
            changes=GraphChanges(**{name: tuple(names) for name, names in values.get("changes", {}).items()}),
            simulated=tuple(values.get("simulated", ())),
        )

    @property
    def ranges(self) -> str:
        """Return how ranges move in training, for example "learned"; with "auto", several ways may occur."""
        if self.options.ranges != "auto":
            return self.options.ranges
        movable = [tensor.ranges for tensor in self.tensors if tensor.fixed_range is None]
        ways = {*movable, *(weight.ranges for weight in self.weights)}
        return " and ".join(sorted(ways - {"calibrated"}, reverse=True))

    @property
    def per_channel(self) -> bool:
        """Return True if options and rules give each output channel of every weight a scale of its own."""
        # The weights decide only where rules do: a transposed convolution in groups has one scale in any case.
        if all(rule.per_channel is None for rule in self.options.rules):
            return self.options.per_channel
        return all(weight.scheme.axis is not None for weight in self.weights)

    def __str__(self) -> str:
        """Return a summary of at most 25 lines: layers by kind, by bits and by block, and what is in float, and why."""
        return as_text(summary(self))

    def __rich__(self) -> RenderableType:
        return summary(self)

    def _repr_html_(self) -> str:
        """Return the summary for a notebook, and all tables behind a click."""
        whole = f"<details><summary>all tensors</summary>{as_html(whole_table(self), WIDE)}</details>"
        return as_html(summary(self)) + whole

    def table(self) -> Shown:
        """Return all tables to print: quantized activations, quantized weights, and what is in float, with reasons."""
        return Shown(whole_table(self))


def replaces(new: Rule, old: Rule) -> bool:
    """Return True if a new rule overrides all fields of an old rule for the same operators."""
    settings = [setting.name for setting in dataclasses.fields(Rule) if setting.name not in ("pattern", "kind")]
    same = (new.pattern, new.kind) == (old.pattern, old.kind)
    return same and all(getattr(new, name) is not None for name in settings if getattr(old, name) is not None)


def _with_scheme(values: dict[str, Any]) -> dict[str, Any]:
    values = {**values, "scheme": Scheme(**values["scheme"])}
    values["observer"] = own_observer(values["observer"])
    values["quantizer"] = own_quantizer(values.get("quantizer"))
    if "learned" in values:  # a plan of halfeven 0.1.0
        values["ranges"] = "learned" if values.pop("learned") else "observed"
    return values
