"""Sweeps over seeds, rows and relatives: a handful runs by default, all of them under `pytest --exhaustive`."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import settings

EXAMPLES = {
    "handful": settings(max_examples=25, deadline=None),
    "exhaustive": settings(max_examples=250, deadline=None),
}
"""Hypothesis' profiles."""


def sweep(members: Iterable[Any], *handful: Any) -> list[Any]:
    """Return the parameters of a sweep. Those outside the handful run with --exhaustive alone."""
    members = list(members)
    assert all(member in members for member in handful), f"{handful} are not all in the sweep"
    return [member if member in handful else _exhaustive(member) for member in members]


def crossed(*axes: Sequence[Any]) -> list[Any]:
    """Return the sweep over all combinations of the axes' values. Its handful has each value at least once."""
    count = max(map(len, axes))
    return sweep(itertools.product(*axes), *(tuple(axis[i % len(axis)] for axis in axes) for i in range(count)))


def _exhaustive(member: Any) -> Any:
    return pytest.param(*(member if isinstance(member, tuple) else [member]), marks=pytest.mark.exhaustive)
