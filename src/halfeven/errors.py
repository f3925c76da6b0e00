"""Every error that halfeven raises on purpose.

    HalfevenError
    ├── ConfigError         an experiment, option or argument that cannot be used
    ├── CaptureError        a model that torch.export cannot turn into a graph
    ├── InputError          inputs of a kind or size that the model was not prepared for
    ├── PlacementError      a scheme or rule that the target or the model cannot follow
    ├── CalibrationError    data or ranges that no scale can be made of
    ├── AlgorithmError      an algorithm that does not apply, or that would change what the model computes
    ├── CheckpointError     a file that does not belong to the model
    ├── StorageError        a file or folder that cannot be written or read
    ├── ExportError         a model that cannot be written for the target
    └── VerificationError   a deployed file that cannot be compared with the model

Each message says what happened, why it matters and what to do. The command line prints it and exits with code 2.
"""

from collections.abc import Iterable

MAX_NAMES = 5
"""Largest number of names in a message."""


class HalfevenError(Exception):
    """Root of all errors that a user can cause and mend."""


class ConfigError(HalfevenError, ValueError):
    """An experiment, option or argument that cannot be used."""


class CaptureError(HalfevenError, RuntimeError):
    """A model that torch.export cannot turn into a graph."""


class InputError(HalfevenError, ValueError):
    """Inputs of a kind or size that the model was not prepared for."""


class PlacementError(HalfevenError, ValueError):
    """A scheme or rule that the target or the model cannot follow."""


class CalibrationError(HalfevenError, ValueError):
    """Data or ranges that no scale can be made of."""


class CheckpointError(HalfevenError, ValueError):
    """A file that does not belong to the model."""


class StorageError(HalfevenError, OSError):
    """A file or folder that cannot be written or read: a full disk, missing rights, a lock."""


class ExportError(HalfevenError, RuntimeError):
    """A model that cannot be written for the target."""


class VerificationError(HalfevenError, RuntimeError):
    """A deployed file that cannot be compared with the model."""


class AlgorithmError(HalfevenError, RuntimeError):
    """An algorithm cannot be applied to a model, or would have changed what the model computes."""


class Interruption(BaseException):
    """Not an error: what stops a command from outside. Like KeyboardInterrupt it passes every `except Exception`."""


class HalfevenWarning(UserWarning):
    """Something that works, and that a user should know of: training clips much of an activation, for example."""


def named(names: Iterable[object]) -> str:
    """Return names as a part of a message; a long list is cut."""
    words = [str(name) for name in names]
    cut = f" and {len(words) - MAX_NAMES} more" if len(words) > MAX_NAMES else ""
    return ", ".join(words[:MAX_NAMES]) + cut


def last_line(error: Exception) -> str:
    """Return the line of a message that tells the reason; the error's class where it is empty.

    It is the last line, or the first where torch's own advice follows.
    """
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if "tlparse" in lines[-1] else lines[-1]
