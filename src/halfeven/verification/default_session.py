"""Run a file in the runtime's default session, as a user does who sets nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from halfeven.runtimes.runtime import DeployedFile
from halfeven.verification.outputs import OutputSums


@dataclass(frozen=True)
class DefaultSession:
    """The outputs of a runtime's default session, beside those of the session that was verified."""

    difference: float
    """Largest difference of an output from the verified output, over the largest absolute value of the latter."""
    settings: list[str]
    """The settings that make the difference, as `name=value`: without any of them the outputs are others."""


def default_session(file: DeployedFile, inputs: Sequence[Tensor], verified: Sequence[Tensor]) -> DefaultSession | None:
    """Run a file in its runtime's default session; None where the runtime needs no settings.

    Args:
        file: an opened file.
        inputs: of one batch.
        verified: the outputs with all settings.
    """
    if not file.settings:
        return None
    # First without any setting: where that makes no difference, single settings are not tried.
    difference = _largest_difference(file.run_with((), inputs), verified)
    if not difference:
        return DefaultSession(0.0, [])
    # A setting is needed where a session without it alone has other outputs.
    others = {setting: [other for other in file.settings if other != setting] for setting in file.settings}
    needed = [s for s, rest in others.items() if _largest_difference(file.run_with(rest, inputs), verified)]
    # Where no setting makes a difference by itself, they do together.
    return DefaultSession(difference, needed or list(file.settings))


def _largest_difference(found: Sequence[Tensor], verified: Sequence[Tensor]) -> float:
    largest = 0.0
    for output, expected in zip(found, verified, strict=True):
        sums = OutputSums("")
        sums.add(output, expected, expected, expected, expected)
        largest = max(largest, sums.result().difference)
    return largest
