"""Files whose float operators run in the precision of the runtime's choice: where integers differ for that reason, they
are compared once more in float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfeven.deployment.file_interface import FloatPrecision
from halfeven.runtimes.runtime import DeployedFile, Runtime


@dataclass(frozen=True)
class Float32Session:
    """The integers of a file in a session that computes float operators in float32, as the exact simulation does."""

    integer_match: float
    """Share of activation integers equal to the exact simulation's."""
    alone_match: float
    """The same where each tensor is computed from the session's own integers before it."""
    first_difference: str
    """The first activation whose integers differ; "" if none."""
    output_difference: float
    """Largest difference of an output from the exact simulation's, over the largest absolute value of that."""


def opened(
    runtime: Runtime, path: Path, tensors: Sequence[str], precision: FloatPrecision | None = None
) -> DeployedFile:
    """Return a file opened in the session that it lists, or with what stays float in another precision."""
    how = {} if precision is None else {"float_precision": precision}
    return runtime.open_file(path, tensors, **how)


def float_precision_of(file: DeployedFile) -> FloatPrecision:
    """Return the precision, of what stays float, that a file is run with."""
    return getattr(file, "float_precision", "f32")
