"""All tests: one thread, which is fastest for tiny models, and the same random numbers whatever ran before."""

import functools
import gc
import os
import pkgutil
import typing
from collections.abc import Callable

os.environ.setdefault("CI", "true")  # else OpenVINO reports its use over the network, a third of each test
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import ONNX Runtime themselves

import pytest
import torch
from hypothesis import settings

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


def _registered_at_once(py_impl: Callable) -> Callable:
    """A quicker `OperatorBase.py_impl` for dispatch keys that have no kernel yet."""

    def quick(operator: typing.Any, key: typing.Any) -> Callable:
        if not isinstance(key, torch._C.DispatchKey) or key in operator.py_kernels:
            return py_impl(operator, key)

        def register(kernel: Callable) -> Callable:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()
            return kernel

        return register

    return quick


QUICKER = {
    # Read anew at each export, and never changed here: the sources of 500 functions, their signatures, and all
    # operators once for each of 40 namespaces.
    ("torch.onnx._internal.exporter._registration.onnxscript_apis", "get_torchlib_ops"): functools.cache,
    ("torch.onnx._internal.exporter._schemas", "op_signature_from_function"): functools.cache,
    ("torch._export.utils", "_materialize_cpp_cia_ops"): functools.cache,
    # Sixteen thousand times a decomposition, each time with the types of its own signature.
    ("torch._ops.OperatorBase", "py_impl"): lambda py_impl: _registered_at_once(py_impl),
    # Of each node; halfeven and its tests read none.
    ("torch.fx.config", "do_not_emit_stack_traces"): lambda _: True,
}
"""What torch's exporters spend much of a small model's time on, and what makes of it what stands for it here."""

gc.set_threshold(50_000, 20, 20)
"""Graphs are many small objects: at Python's own threshold looking for cycles takes a tenth of the time."""


def pytest_collection_finish() -> None:
    gc.freeze()  # what was imported stays: looking through it for cycles takes half a second each time


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else extensions complain at the end of what was not freed


@pytest.fixture(scope="session", autouse=True)
def _exporters_are_quick():
    with pytest.MonkeyPatch.context() as patch:
        for (module, name), quicker in QUICKER.items():
            try:
                owner = pkgutil.resolve_name(module)
                patch.setattr(owner, name, quicker(getattr(owner, name)))
            except (ImportError, AttributeError):  # another torch, whose exporters are arranged otherwise
                continue
        yield


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without compiled kernels, which take longer to build than small models to run."""
    monkeypatch.setattr("halfeven.quantization.compile._works", False)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
