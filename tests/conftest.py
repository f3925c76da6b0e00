"""All tests: one thread, which is fastest for tiny models, and the same random numbers whatever ran before."""

import functools
import os
import pkgutil

os.environ.setdefault("CI", "true")  # else OpenVINO reports its use over the network, a third of each test

import pytest
import torch

torch.set_num_threads(1)


READ_AT_EACH_EXPORT = {
    "torch.onnx._internal.exporter._registration.onnxscript_apis": "get_torchlib_ops",  # the sources of 500 functions
    "torch.onnx._internal.exporter._schemas": "op_signature_from_function",
    "torch._export.utils": "_materialize_cpp_cia_ops",  # all operators, once for each of 40 namespaces
}
"""What torch's exporters read anew at each export and what never changes here: much of what a small model takes."""


@pytest.fixture(scope="session", autouse=True)
def _exporters_read_once():
    with pytest.MonkeyPatch.context() as patch:
        for module, name in READ_AT_EACH_EXPORT.items():
            try:
                owner = pkgutil.resolve_name(module)
                patch.setattr(owner, name, functools.cache(getattr(owner, name)))
            except (ImportError, AttributeError):  # another torch, whose exporters are arranged otherwise
                continue
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
