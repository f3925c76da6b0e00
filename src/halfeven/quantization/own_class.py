"""Describe a user's own observer or quantizer: the class, and the name and version that files keep of it.

Files contain no code. A quantizer that is read from a file has its range, which is all that its integers need; the
class is needed again only to calibrate or to train.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from halfeven.errors import CalibrationError, ConfigError

UNVERSIONED = "unversioned"
"""Version of a class without the attribute `version`."""


@dataclass(frozen=True)
class OwnClass:
    """A user's class by its name and version, and the class itself where it was passed in."""

    name: str
    """Module and qualified name, such as "mine.ranges.Trimmed"."""
    version: str = UNVERSIONED
    """The class's attribute `version`: increase it when the class proposes other ranges."""
    implementation: type | None = field(default=None, compare=False, repr=False)
    """The class; None where the name was read from a file."""

    def __str__(self) -> str:
        """Return name and version, as plans print them."""
        return f"{self.name} ({self.version})"


def own_class(value: Any, methods: Mapping[str, tuple[str, ...]], made_with: Sequence[str] = ("scheme",)) -> Any:
    """Return the description of a class, or of a class that a file names; any other value as it is.

    Args:
        value: a class, the dict that `plain_values` makes of an `OwnClass`, or the value of an option.
        methods: the methods that the class must have -> their arguments.
        made_with: the arguments that the class is made with: the first by its place, the others by name.

    Raises:
        ConfigError: the class lacks a method, or cannot be called with the arguments.
    """
    if isinstance(value, Mapping) and value.keys() == {"name", "version"}:
        return OwnClass(str(value["name"]), str(value["version"]))
    if not isinstance(value, type):
        return value
    # The module of a class in a config has no name that could be imported: "<run_path>".
    name = value.__qualname__ if value.__module__.startswith("<") else f"{value.__module__}.{value.__qualname__}"
    if missing := [method for method in methods if not callable(getattr(value, method, None))]:
        raise ConfigError(
            f"The class {name} has no method {' and no method '.join(missing)}, so it cannot set a range. It needs "
            f"{', '.join(methods)}: see halfeven.Observer and halfeven.Quantizer."
        )
    _check_call(name, value, made_with[:1], made_with[1:])
    for method, arguments in methods.items():
        # Looked up on the class, a method takes `self` as an argument.
        _check_call(f"{name}.{method}", getattr(value, method), ("self", *arguments))
    return OwnClass(name, str(getattr(value, "version", UNVERSIONED)), value)


def _check_call(name: str, called: Any, by_place: Sequence[str], by_name: Sequence[str] = ()) -> None:
    """Refuse a class or a method that does not take its arguments.

    Raises:
        ConfigError: it does not.
    """
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # written in another language
        return
    try:
        signature.bind(*by_place, **dict.fromkeys(by_name))
    except TypeError as error:
        given = ", ".join([argument for argument in by_place if argument != "self"] + [f"{n}=..." for n in by_name])
        raise ConfigError(
            f"{name}{signature} cannot be called as {name.rpartition('.')[2]}({given}): {error}. Take these arguments: "
            "see halfeven.Observer and halfeven.Quantizer."
        ) from error


def checked_range(observer: OwnClass, found: Any) -> tuple[Tensor, Tensor]:
    """Return the range that a user's observer proposed, as tensors.

    Raises:
        CalibrationError: it is no pair of numbers, or an end is below the other.
    """
    try:
        low, high = (torch.as_tensor(end, dtype=torch.float32) for end in found)
        wrong = low.shape != high.shape or bool((low > high).any())
    except (TypeError, ValueError, RuntimeError):
        wrong = True
    if wrong:
        raise CalibrationError(
            f"the method range of the observer {observer} returned {str(found)[:80]}, which is no range; return low "
            "and high, each [channels], with low at most high"
        )
    return low, high


def check_count(name: str, ranges: int, channels: int) -> None:
    """Refuse an observer's ranges whose number is not that of the channels.

    Args:
        name: the quantizer's name.
        ranges: the number of ranges.
        channels: the number of channels that have a scale.

    Raises:
        CalibrationError: the numbers differ.
    """
    if ranges != channels:
        raise CalibrationError(
            f"{name or 'A quantizer'} was given {ranges} range for {channels} channels, so its channels would have no "
            "scale. An observer sees [channels, ...] and returns [channels] for each end."
        )


def plain_values(instance: Any) -> dict[str, Any]:
    """Return a dataclass and all dataclasses in it as plain values, for JSON: own classes by name and version."""

    def without_code(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in items if name != "implementation"}

    return dataclasses.asdict(instance, dict_factory=without_code)
