"""All tests: one thread, which is fastest for tiny models, and the same random numbers whatever ran before."""

import gc
import os

os.environ.setdefault("CI", "true")  # else OpenVINO reports its use over the network, a third of each test
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import ONNX Runtime themselves

import pytest
import torch
from hypothesis import settings

import exporters
import sweeps
from processes import forked

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="Run all members of each sweep, not a handful.")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "exhaustive: a member of a sweep that runs with --exhaustive alone")
    for name, profile in sweeps.EXAMPLES.items():
        settings.register_profile(name, profile)
    settings.load_profile("exhaustive" if config.getoption("--exhaustive") else "handful")


def pytest_sessionstart(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):  # a worker of pytest-xdist, which starts no process later on
        forked()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs with --exhaustive alone."""
    if config.getoption("--exhaustive"):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


gc.set_threshold(50_000, 20, 20)
"""Graphs are many small objects: at Python's own threshold looking for cycles takes a tenth of the time."""


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: looking through it for cycles takes half a second each time


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extensions complain at the end of what was not freed


@pytest.fixture(scope="session", autouse=True)
def _exporters_are_quick():
    with pytest.MonkeyPatch.context() as patch:
        exporters.quicken(patch)
        yield


KERNELS_WORK = "halfeven.quantization.compile._works"


@pytest.fixture(scope="session", autouse=True)
def _kernels_are_not_built(request: pytest.FixtureRequest):
    """Compiled kernels take longer to build than small models to run: tests of kernels ask for `fused`.

    With --exhaustive all tests have them.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not request.config.getoption("--exhaustive"):
            patch.setattr(KERNELS_WORK, False)
        yield


@pytest.fixture
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With compiled kernels, as users have them, and from the first call on."""
    if "unfused" not in request.fixturenames:
        monkeypatch.setattr(KERNELS_WORK, None)
        monkeypatch.setattr("halfeven.quantization.compile.UNFUSED_NUMBERS", 0)


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled kernels, with --exhaustive too."""
    monkeypatch.setattr(KERNELS_WORK, False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
