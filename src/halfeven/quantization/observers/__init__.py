"""Observers see the batches of a tensor and propose its range (white paper, section 3.1).

An observer sees tensors of shape [channels, ...], or [1, ...] where the tensor has one scale. Statistics accumulate
over all batches and processes; the range is chosen once, at the end.
"""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

from halfeven.errors import ConfigError
from halfeven.options import converted
from halfeven.quantization.observers.cross_entropy import CrossEntropyObserver
from halfeven.quantization.observers.histogram import (
    BINS,
    HistogramObserver,
    entropy_range,
    mse_range,
    percentile_range,
)
from halfeven.quantization.observers.lsq import LSQObserver
from halfeven.quantization.observers.minmax import (
    MinMaxObserver,
    MovingAverageObserver,
    Observer,
    batch_extremes,
    check_finite,
    extremes,
    finite_extremes,
    largest_of_processes,
    rows,
)
from halfeven.quantization.own_class import OwnClass, own_class
from halfeven.quantization.scheme import Scheme

__all__ = [
    "BINS",
    "LOGITS",
    "OBSERVERS",
    "CrossEntropyObserver",
    "HistogramObserver",
    "Observer",
    "ObserverChoice",
    "ObserverName",
    "batch_extremes",
    "check_finite",
    "entropy_range",
    "extremes",
    "finite_extremes",
    "largest_of_processes",
    "make_observer",
    "mse_range",
    "percentile_range",
    "rows",
]

OBSERVERS: dict[str, Callable[[Scheme], Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": lambda scheme: HistogramObserver(scheme, percentile_range),
    "mse": lambda scheme: HistogramObserver(scheme, mse_range),
    "lp": lambda scheme: HistogramObserver(scheme, partial(mse_range, power=2.4)),
    "entropy": lambda scheme: HistogramObserver(scheme, entropy_range),
    "lsq": LSQObserver,
    "cross_entropy": CrossEntropyObserver,
}
"""Constructors of observers by their names in options. "lp" is "mse" with the power 2.4 of BRECQ (arXiv 2102.05426) and
QDrop (arXiv 2203.05740), which clips less."""

ObserverName = Literal["minmax", "moving_average", "percentile", "mse", "lp", "entropy", "lsq"]
"""The estimators that suit any tensor, which options may name."""

LOGITS = "cross_entropy"
"""Name of the observer for logits of classes, which suits no other tensor."""


def own_observer(value: Any) -> Any:
    """Return the description of a user's observer class; any other value as it is.

    Raises:
        ConfigError: the class lacks `update` or `range`.
    """
    return own_class(value, {"update": ("values",), "range": ()})


ObserverChoice = Annotated[ObserverName | type[Observer] | OwnClass, converted(own_observer, OwnClass)]
"""An estimator as options take it: its name, or a class of the user's with the methods of `Observer`, which is made
with the scheme of the tensor."""


def make_observer(name: str | OwnClass, scheme: Scheme) -> Observer:
    """Return a new observer.

    Args:
        name: a key of `OBSERVERS`, or a user's class.
        scheme: the grid that the range is for.

    Raises:
        ConfigError: there is no observer of that name, or the class is not at hand.
    """
    if isinstance(name, OwnClass):
        if name.implementation is None:
            raise ConfigError(
                f"The range is one of the observer {name}, a class of your own, and files contain no code, so it "
                "cannot be estimated again without the class. Pass the class in: halfeven.set_rules(qmodel, "
                f"halfeven.Rule(observer={name.name.rpartition('.')[2]})). Without calibration the stored range holds."
            )
        own: Observer = name.implementation(scheme)
        return own
    if name not in OBSERVERS:
        raise ConfigError(
            f'There is no observer "{name}", so no range can be set. Choose one of {", ".join(OBSERVERS)}.'
        )
    return OBSERVERS[name](scheme)
