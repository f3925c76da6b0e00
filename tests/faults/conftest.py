"""A run that takes about a second, without fused kernels."""

import pytest

from halfeven.quantization import compile as compilation

from .tiny_run import write_configs


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch):
    monkeypatch.setattr(compilation, "_works", False)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return write_configs(folder)
