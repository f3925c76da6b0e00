"""Define the plan: the tensors and weights that are quantized, their schemes, and the reasons of all others.

It is decided, and can be printed, before any quantizer is inserted.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import PlacementError
from halfeven.graph.dynamic_shapes import as_dynamic_shapes
from halfeven.graph.kept_in_python import KeptInPython
from halfeven.placement.options import QuantizationOptions as QuantizationOptions
from halfeven.placement.options import Rule as Rule
from halfeven.quantization.quantizer import Ranges
from halfeven.quantization.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """A quantized activation: a single quantizer, called after each of `places`."""

    name: str
    places: tuple[str, ...]
    """Names of the tensors, "region:tensor" where the model has several regions."""
    scheme: Scheme
    ranges: Ranges
    observer: str
    fixed_range: tuple[float, float] | None = None
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PlannedWeight:
    """A quantized weight."""

    name: str
    """Name of the layer, as in `PlannedTensor.places`."""
    scheme: Scheme
    channels: int | None
    ranges: Ranges
    observer: str


@dataclass(frozen=True, kw_only=True)
class LeftInFloat:
    """A tensor or operator that is not quantized."""

    name: str
    operator: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class GraphChanges:
    """The changes of algorithms to the graph after the plan was made; loading a checkpoint repeats them."""

    unclipped: tuple[str, ...] = ()
    """ReLU6 and clamp operators whose upper bound was removed, so that they are ReLUs now."""
    given_biases: tuple[str, ...] = ()
    """Layers that had no bias and were given a bias."""
    rescaled: tuple[str, ...] = ()
    """LayerNorms that additions read through a factor and an offset of each channel, in float."""
    untied: tuple[str, ...] = ()
    """Parameters, such as "head.weight", that were copied for their layer before an algorithm changed them there,
    because other operators read them too."""

    def __str__(self) -> str:
        said = {
            "No longer clipped above (ReLU now)": self.unclipped,
            "Layers that were given a bias": self.given_biases,
            "Read by additions through a factor and an offset of each channel": self.rescaled,
            "No longer tied to what else reads them": self.untied,
        }
        return "\n".join(f"{what}: {', '.join(names)}" for what, names in said.items() if names)


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
    decide: "Callable[[QuantizationOptions], Plan] | None" = field(default=None, repr=False, compare=False)
    """Makes the plan of the same graph for other options. Files and pickles do not contain it: a plan that is read has
    None until a model is prepared with the plan."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Plan":
        """Return the plan itself: nothing in it changes."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle contains: all fields except the graph to decide about, as in a file."""
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
        kept = [rule for rule in self.options.rules if not any(_replaces(new, rule) for new in rules)]
        options = dataclasses.replace(self.options, rules=(*kept, *rules))
        return dataclasses.replace(self.decide(options), changes=self.changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, for JSON."""
        values = dataclasses.asdict(dataclasses.replace(self, decide=None))
        del values["decide"]
        return values

    @staticmethod
    @checked_arguments(PlacementError)
    def from_dict(values: dict[str, Any]) -> "Plan":
        """Return the plan that `to_dict` wrote; lists may stand for tuples, as after a round trip through JSON."""
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
        )

    def __str__(self) -> str:
        """Return three tables: quantized activations, quantized weights, and outputs in float with their reasons."""
        options = self.options
        parts = [
            f"Plan for {options.target}, {options.scheme}, {options.ranges} ranges, BatchNorm {options.batchnorm}: "
            f"{len(self.weights)} layers with quantized weights, {len(self.tensors)} quantized activations.",
            _table(
                ("activation", "scheme", "range", "read by"),
                [(" = ".join(t.places), str(t.scheme), _range(t), ", ".join(t.consumers)) for t in self.tensors],
            ),
            _table(
                ("weight of", "scheme", "range"),
                [(w.name, str(w.scheme), _range(w)) for w in self.weights],
            ),
            _table(
                ("output in float", "operator", "because"),
                [(left.name, left.operator, left.reason) for left in self.left],
            ),
            *self.notes,
            str(self.changes),
        ]
        return "\n\n".join(part for part in parts if part)


def _replaces(new: Rule, old: Rule) -> bool:
    """Return True if a new rule overrides all fields of an old rule for the same operators."""
    settings = ("weight_bits", "activation_bits", "observer", "quantize")
    same = (new.pattern, new.kind) == (old.pattern, old.kind)
    return same and all(getattr(new, name) is not None for name in settings if getattr(old, name) is not None)


def _range(tensor: PlannedTensor | PlannedWeight) -> str:
    if isinstance(tensor, PlannedTensor) and tensor.fixed_range:
        return f"fixed {list(tensor.fixed_range)}"
    return tensor.observer if tensor.ranges == "observed" else f"{tensor.observer}, then {tensor.ranges}"


def _with_scheme(values: dict[str, Any]) -> dict[str, Any]:
    values = {**values, "scheme": Scheme(**values["scheme"])}
    if "learned" in values:  # a plan of halfeven 0.1.0
        values["ranges"] = "learned" if values.pop("learned") else "observed"
    return values


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
