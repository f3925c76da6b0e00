"""Sweeps over seeds, rows and relatives: a handful runs by default, all of them under `pytest --exhaustive`."""

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
    return [member if member in handful else pytest.param(member, marks=pytest.mark.exhaustive) for member in members]
