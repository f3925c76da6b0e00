"""Read the plan of a file, and check each of its values."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfeven.errors import CheckpointError, HalfevenError
from halfeven.options import mistakes
from halfeven.placement.plan import Plan, PlannedTensor, PlannedWeight
from halfeven.quantization.observers import OBSERVERS
from halfeven.quantization.scheme import parse_bits


def read_plan(text: str, path: Path) -> Plan:
    """Return the plan that a file holds as JSON.

    Args:
        text: the JSON of `Plan.to_dict`.
        path: the file, for the message.

    Raises:
        CheckpointError: the text is no plan, or a value in it cannot be.
    """
    try:
        plan = Plan.from_dict(json.loads(text))
        problems = list(_problems(plan))
    except HalfevenError as error:
        raise _damaged_error(path, str(error)) from error
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise _damaged_error(path, f"{type(error).__name__} at {str(error)[:100]}") from error
    if problems:
        raise _damaged_error(path, "; ".join(problems[:3]))
    return plan


def _damaged_error(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"The plan in {path} cannot be read, so it does not say how the weights are quantized: {reason}. Copy the file "
        "again from where it was written, or use another checkpoint."
    )


def _problems(plan: Plan) -> Iterator[str]:
    """Yield the values that no plan written by halfeven has."""
    for kind in ("tensors", "weights", "left", "kept"):
        for number, entry in enumerate(getattr(plan, kind)):
            yield from mistakes(type(entry), _field_values(entry), f"{kind}[{number}]")
    yield from mistakes(type(plan.changes), _field_values(plan.changes), "changes")
    yield from (f"a note is {note!r}" for note in plan.notes if not isinstance(note, str))
    entries: list[PlannedTensor | PlannedWeight] = [*plan.tensors, *plan.weights]
    for entry in entries:
        yield from _problems_of(entry)
        what = "weight" if isinstance(entry, PlannedWeight) else "activation"
        # Scheme, ends and rules are all that a width can come from.
        asked = _widths_named(plan, f"{what}_bits", 0 if what == "weight" else 1)
        if entry.scheme.bits not in asked:
            yield f"{what} {entry.name} has {entry.scheme.bits} bits, and the options of the plan name {sorted(asked)}"


def _field_values(entry: Any) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}


def _widths_named(plan: Plan, field: str, place: int) -> set[int]:
    """Return the widths that the options name for weights or activations."""
    options = plan.options
    asked = {parse_bits(options.scheme)[place], options.first_and_last_bits}
    return {bits for bits in (*asked, *(getattr(rule, field) for rule in options.rules)) if isinstance(bits, int)}


def _problems_of(entry: PlannedTensor | PlannedWeight) -> Iterator[str]:
    """Yield the values that no entry of such a plan has."""
    if isinstance(entry.observer, str) and entry.observer not in OBSERVERS:
        yield f'{entry.name} has the observer "{entry.observer}", and there is none of that name'
    if isinstance(entry, PlannedWeight):
        if (entry.channels is None) != (entry.scheme.axis is None) or (
            entry.channels is not None and entry.channels < 1
        ):
            yield f"{entry.name} has {entry.channels} channels on the axis {entry.scheme.axis}"
        if not 0 <= (entry.scheme.axis or 0) <= 1:
            yield f"{entry.name} has its channels on the axis {entry.scheme.axis}"
    elif not entry.places or entry.scheme.axis is not None:
        yield f"{entry.name} has {len(entry.places)} places and the axis {entry.scheme.axis}"
    elif entry.fixed_range and not entry.fixed_range[0] < entry.fixed_range[1]:
        yield f"{entry.name} has the range {list(entry.fixed_range)}"
