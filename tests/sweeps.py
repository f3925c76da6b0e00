"""Sweeps over seeds, rows and relatives: a handful runs by default, all of them under `pytest --exhaustive`."""

import itertools
from collections.abc import Iterable
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


def crossed(*axes: Iterable[Any]) -> list[Any]:
    """Return the sweep over all combinations of the axes' values. Its handful has each value at least once.

    A value that is a tuple stands for several parameters.
    """
    axes = [list(axis) for axis in axes]
    handful = [[axis[i % len(axis)] for axis in axes] for i in range(max(map(len, axes)))]
    return sweep(map(_flat, itertools.product(*axes)), *map(_flat, handful))


def _flat(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(itertools.chain.from_iterable(v if isinstance(v, tuple) else [v] for v in values))


def _exhaustive(member: Any) -> Any:
    return pytest.param(*(member if isinstance(member, tuple) else [member]), marks=pytest.mark.exhaustive)
