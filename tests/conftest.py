"""All tests: one thread, which is fastest for tiny models, and the same random numbers whatever ran before."""

import functools
import os

os.environ.setdefault("CI", "true")  # else OpenVINO reports its use over the network, a third of each test

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _exporter_reads_its_functions_once():
    """At each export torch.onnx reads the sources of its 500 functions anew, much of what a small model takes."""
    try:
        from torch.onnx._internal.exporter._registration import onnxscript_apis as functions

        read = functools.cache(functions.get_torchlib_ops)
    except (ImportError, AttributeError):  # another torch, whose exporter is arranged otherwise
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "get_torchlib_ops", read)
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
