"""All tests: one thread, which is fastest for tiny models, and the same random numbers whatever ran before."""

import functools
import gc
import os
import pkgutil
import typing

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

REPLACED = {
    ("torch._ops", "Callable"): typing.Callable,  # remembers its types; thousands are made at each decomposition
    ("torch.fx.config", "do_not_emit_stack_traces"): True,  # of each node; halfeven and its tests read none
}
"""What torch's exporters spend much time on, and what stands for it here."""

gc.set_threshold(50_000, 20, 20)
"""Graphs are many small objects: at Python's own threshold looking for cycles takes a tenth of the time."""


@pytest.fixture(scope="session", autouse=True)
def _exporters_are_quick():
    with pytest.MonkeyPatch.context() as patch:
        for module, name in READ_AT_EACH_EXPORT.items():
            _try(patch, module, name, functools.cache)
        for (module, name), value in REPLACED.items():
            _try(patch, module, name, lambda _, value=value: value)
        yield


def _try(patch, module, name, replaced):
    try:
        owner = pkgutil.resolve_name(module)
        patch.setattr(owner, name, replaced(getattr(owner, name)))
    except (ImportError, AttributeError):  # another torch, whose exporters are arranged otherwise
        return


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
