"""Errors about a range, which name its quantizer and say where to look."""

from collections.abc import Iterator
from contextlib import contextmanager

from halfeven.errors import CalibrationError, last_line
from halfeven.quantization.own_class import OwnClass


@contextmanager
def naming(name: str, *, weight: bool, observer: str | OwnClass) -> Iterator[None]:
    """Turn errors about a range, within the context, into errors that name its quantizer.

    Args:
        name: the quantizer's name; "" for a quantizer without a name.
        weight: True for a weight's quantizer.
        observer: the range estimator, by name, or the user's.

    Raises:
        CalibrationError: no range can be set.
    """
    try:
        yield
    except CalibrationError as error:
        raise _range_error(name, weight, str(error)) from error
    # An observer of the user's may raise anything; an error of halfeven's own stays what it is.
    except Exception as error:
        if not isinstance(observer, OwnClass) or isinstance(error, Warning):
            raise
        told = f"the observer {observer} ended with {type(error).__name__}: {last_line(error)}"
        raise _range_error(name, weight, told) from error


def _range_error(name: str, weight: bool, told: str) -> CalibrationError:
    where = "float model's weights" if weight else "calibration data and at the float model's outputs on it"
    return CalibrationError(
        f"No range can be set for {name or 'a tensor'}: {told.rstrip('.')}. A scale made of it would make "
        f"all results wrong. Look at the {where}."
    )
