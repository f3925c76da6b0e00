"""The steps that a search can take: a candidate for a unit, with the quantizers that it changes and their ranges."""

import dataclasses
import glob
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from halfeven.diagnosis.exchanged_ranges import GridRange, grid_range, planned_quantizers, set_grid_range
from halfeven.errors import ConfigError, HalfevenWarning, PlacementError
from halfeven.graph.copying import copy_model
from halfeven.layerwise.calibrate import calibrate
from halfeven.mixed_precision.units import Unit
from halfeven.placement.insertion import plan_of
from halfeven.placement.options import QuantizationOptions, Rule
from halfeven.placement.plan import Plan, PlannedTensor, PlannedWeight
from halfeven.placement.requantization import apply_rules
from halfeven.quantization.quantizer import Mode, Quantizer
from halfeven.quantization.scheme import parse_bits
from halfeven.targets.target import Target

Entry = PlannedTensor | PlannedWeight
"""The entry of a quantizer in a plan."""

TENSOR_FIELDS = ("activation_bits", "symmetric", "signed", "observer", "power_of_two")
WEIGHT_FIELDS = ("weight_bits", "observer", "per_channel", "power_of_two")
"""Fields of a rule that a candidate may set for the tensors of a unit, and for the weights that read them."""


@dataclass(frozen=True, eq=False)
class Move:
    """A candidate for a unit."""

    unit: Unit
    candidate: Rule
    rules: tuple[Rule, ...]
    """The rules that make it, to paste into a config."""
    settings: Mapping[Quantizer, GridRange | None]
    """The new scheme and range of each quantizer; None: float."""

    @property
    def in_float(self) -> bool:
        """True if the unit's operators compute in float."""
        return self.candidate.quantize is False

    def __str__(self) -> str:
        """Return the change in words."""
        return candidate_text(self.candidate)

    def apply(self) -> None:
        """Give the quantizers their settings, in place."""
        for quantizer, setting in self.settings.items():
            if setting is None:
                quantizer.mode = Mode.FLOAT
            else:
                quantizer.mode = Mode.QUANTIZE
                set_grid_range(quantizer, setting)

    def raises(self) -> bool:
        """Return True if no quantizer would get fewer bits than it has, and at least one has something to gain."""
        pairs = [(None if q.mode is Mode.FLOAT else q.scheme.bits, s) for q, s in self.settings.items()]
        # A quantizer that is off, in float, cannot be raised further.
        if any(bits is None and setting is not None for bits, setting in pairs):
            return False
        # A later move must not take back the bits that an earlier one has given.
        if any(bits is not None and setting is not None and setting.scheme.bits < bits for bits, setting in pairs):
            return False
        # It has something to gain where a quantizer goes to float, or gets another grid or range than it has.
        return any(setting is None and bits is not None for bits, setting in pairs) or any(
            setting is not None and not self._has_setting(quantizer, setting)
            for quantizer, setting in self.settings.items()
        )

    def _has_setting(self, quantizer: Quantizer, setting: GridRange) -> bool:
        state = quantizer.state_dict()
        return quantizer.scheme == setting.scheme and all(state[k].equal(v) for k, v in setting.state.items())


def candidate_text(candidate: Rule) -> str:
    """Return a candidate in words, such as "activation_bits 8"."""
    if candidate.quantize is False:
        return "float"
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in _fields_set(candidate).items())


def _fields_set(candidate: Rule) -> dict[str, Any]:
    given = ((field.name, getattr(candidate, field.name)) for field in dataclasses.fields(candidate))
    return {name: value for name, value in given if value is not None and name not in ("pattern", "kind")}


def usual_candidates(options: QuantizationOptions) -> tuple[Rule, ...]:
    """Return the choices of a runtime for a scheme: 8 bits where the scheme has fewer, another observer, and float."""
    weight_bits, activation_bits = parse_bits(options.scheme)
    found = []
    if activation_bits < 8:
        found.append(Rule(activation_bits=8))
    if weight_bits < 7:
        found.append(Rule(weight_bits=8))
    if activation_bits <= 8:
        found.append(Rule(observer="lp" if activation_bits < 8 else "minmax"))
    return (*found, Rule(quantize=False))


def check_candidates(candidates: Sequence[Rule]) -> None:
    """Refuse candidates that a search cannot try.

    Raises:
        ConfigError: there is none, one names operators, or sets a field that a search does not exchange.
    """
    if not candidates:
        raise ConfigError(
            "candidates is empty, so there is nothing to search among. Give rules, or leave candidates out."
        )
    for candidate in candidates:
        if not isinstance(candidate, Rule):
            raise ConfigError(
                f"The candidate {candidate!r} is no halfeven.Rule, so it says nothing to try. Give rules without a "
                "pattern, such as halfeven.Rule(activation_bits=8)."
            )
        given = _fields_set(candidate)
        wrong = [name for name in given if name not in (*TENSOR_FIELDS, *WEIGHT_FIELDS, "quantize")]
        if candidate.pattern != "*" or wrong or not given or candidate.quantize is True:
            raise ConfigError(
                f"The candidate {candidate} cannot be tried: a candidate has no pattern, since the search chooses the "
                f"operators, and sets {', '.join(dict.fromkeys((*TENSOR_FIELDS, *WEIGHT_FIELDS)))} or quantize=False. "
                "Set other fields by rules=, which hold for the whole search."
            )


def moves_of(
    qmodel: nn.Module, units: Sequence[Unit], candidates: Sequence[Rule], batches: Sequence[Any], target: Target
) -> list[Move]:
    """Return all steps: each candidate for each unit where it changes a quantizer.

    Args:
        qmodel: the calibrated model without any step.
        units: its units.
        candidates: rules without a pattern.
        batches: calibration batches.
        target: the runtime.

    Raises:
        PlacementError: the target cannot run a candidate.
    """
    plan = plan_of(qmodel)
    known = {quantizer.name: quantizer for quantizer, _ in planned_quantizers(qmodel)}
    found = []
    for candidate in candidates:
        # Calibrated once, as if the candidate held for all units: a calibration for each would read the batches again.
        ranges = {} if candidate.quantize is False else _ranges_with(qmodel, candidate, batches, target)
        for unit in units:
            rules = tuple(_unit_rules(unit, candidate))
            settings = _changed_settings(plan, rules, known, ranges)
            if settings:
                found.append(Move(unit, candidate, rules, settings))
    return found


def _ranges_with(qmodel: nn.Module, candidate: Rule, batches: Sequence[Any], target: Target) -> dict[str, GridRange]:
    """Return the grids and ranges of all quantizers, by name, where a candidate holds everywhere."""
    copied = copy_model(qmodel)
    apply_rules(copied, [candidate], target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HalfevenWarning)  # the model's own calibration has warned
        calibrate(copied, batches)
    return {quantizer.name: grid_range(quantizer) for quantizer, _ in planned_quantizers(copied)}


def _unit_rules(unit: Unit, candidate: Rule) -> Iterator[Rule]:
    """Yield the rules that make a candidate for a unit."""
    if candidate.quantize is False:
        for name in unit.readers:
            yield dataclasses.replace(candidate, pattern=glob.escape(name))
        return
    # Each field goes to the operators that it concerns: those of activations to the tensors, those of weights to the
    # layers.
    for names, fields in ((unit.tensors, TENSOR_FIELDS), (unit.layers, WEIGHT_FIELDS)):
        given: dict[str, Any] = {name: value for name, value in _fields_set(candidate).items() if name in fields}
        for name in names if given else ():
            yield Rule(pattern=glob.escape(name), kind=candidate.kind, **given)


def _changed_settings(
    plan: Plan, rules: Sequence[Rule], known: Mapping[str, Quantizer], ranges: Mapping[str, GridRange]
) -> dict[Quantizer, GridRange | None]:
    """Return the changes by rules: the settings of the quantizers that the plan with them describes otherwise."""
    if not rules:
        return {}
    try:
        after = plan.with_rules(*rules)
    except PlacementError:  # the candidate is none for this unit: a layer of another kind, say
        return {}
    old = entries(plan)
    new = entries(after)
    found: dict[Quantizer, GridRange | None] = {}
    for name, entry in old.items():
        quantizer = known.get(name)
        if quantizer is None or (quantizer.weight and quantizer.state.fixed):
            continue  # learned rounding: its float weights are gone
        # A plan has no quantizer for a tensor that its rules leave in float.
        if name not in new:
            found[quantizer] = None
        elif (new[name].scheme, new[name].observer) != (entry.scheme, entry.observer) and name in ranges:
            found[quantizer] = ranges[name]
    return found


def entries(plan: Plan) -> dict[str, Entry]:
    """Return the entries of a plan by the names of their quantizers."""
    found: list[Entry] = [*plan.tensors, *plan.weights]
    return {entry.quantizer_name: entry for entry in found}
