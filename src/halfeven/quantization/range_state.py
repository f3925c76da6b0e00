"""The state of a quantizer's range: whether there is a range, and what moves it."""

import enum


class RangeState(enum.Enum):
    """The state of a quantizer's range.

    The value of a state is its code in files (the buffer `observing`: 1 where training batches move the range, 2 where
    nothing does, else 0) and True where a range is set.
    """

    UNSET = (0, False)
    """There is no range; calibration sets it."""
    STARTING = (1, False)
    """There is no range; calibration or the first training batch sets it."""
    OBSERVING = (1, True)
    """Training batches move the range. A weight in this state always has the range of its present values."""
    CALIBRATED = (0, True)
    """The range stays until the next calibration, except that the loss moves a learned range."""
    FIXED = (2, True)
    """Nothing moves the range, not even calibration."""

    def __init__(self, code: int, has_range: bool) -> None:
        self.code = code
        self.has_range = has_range
        self.observing = code == 1
        self.fixed = code == 2


def state_of(*, observing: bool, has_range: bool) -> RangeState:
    """Return the state of a range that is not fixed."""
    if observing:
        return RangeState.OBSERVING if has_range else RangeState.STARTING
    return RangeState.CALIBRATED if has_range else RangeState.UNSET
