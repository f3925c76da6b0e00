"""What torch's exporters do anew in each export, done once: the larger part of the time of a small model."""

import contextlib
import functools
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch._subclasses import fake_impls


def _registered_at_once(py_impl: Callable) -> Callable:
    """A quicker `OperatorBase.py_impl` for dispatch keys that have no kernel yet."""

    def quick(operator: Any, key: Any) -> Callable:
        if not isinstance(key, torch._C.DispatchKey) or key in operator.py_kernels:
            return py_impl(operator, key)

        def register(kernel: Callable) -> Callable:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()
            return kernel

        return register

    return quick


def _overridden_at_once(override: Callable) -> Callable:
    """A quicker `_override_composite_implicit_decomp`: the same kernels of an operator serve each time."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    known: dict[Any, tuple[dict[Any, Any], Callable]] = {}

    def learn(operator: Any, decomposition: Callable) -> None:
        before = operator.py_kernels.copy()
        with override({operator: decomposition}):
            added = {key: kernel for key, kernel in operator.py_kernels.items() if key not in before}
            known[operator] = added, fake_impls.op_implementations_dict[operator]

    @contextlib.contextmanager
    def quick(decompositions: Mapping[Any, Callable]) -> Iterator[None]:
        before = {}
        for operator, decomposition in decompositions.items():
            if operator not in known:
                learn(operator, decomposition)
            added, rule = known[operator]
            before[operator] = operator.py_kernels.copy()
            operator.py_kernels.update({**added, **before[operator], composite: decomposition})
            operator._dispatch_cache.clear()
            if operator not in fake_impls.op_implementations_dict:
                fake_impls.register_op_impl(operator)(rule)
        try:
            yield
        finally:
            for operator, kernels in before.items():
                operator.py_kernels.clear()
                operator.py_kernels.update(kernels)
                operator._dispatch_cache.clear()
                fake_impls._deregister_op_impl(operator)

    return quick


QUICKER = {
    # Read anew at each export, and never changed here: the sources of 500 functions, their signatures, and all
    # operators once for each of 40 namespaces.
    ("torch.onnx._internal.exporter._registration.onnxscript_apis", "get_torchlib_ops"): functools.cache,
    ("torch.onnx._internal.exporter._schemas", "op_signature_from_function"): functools.cache,
    ("torch._export.utils", "_materialize_cpp_cia_ops"): functools.cache,
    ("torch._export.utils", "_collect_all_valid_cia_ops_for_aten_namespace"): functools.cache,
    # Twenty kernels for each of 500 operators, put in the place of their own and taken out again.
    ("torch.export.exported_program", "_override_composite_implicit_decomp"): _overridden_at_once,
    # Sixteen thousand times a decomposition, each time with the types of its own signature.
    ("torch._ops.OperatorBase", "py_impl"): _registered_at_once,
    # Of each node; halfeven and its tests read none.
    ("torch.fx.config", "do_not_emit_stack_traces"): lambda _: True,
}
"""Where it stands, and what makes of it what stands for it here."""


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Put them in place."""
    for (module, name), quicker in QUICKER.items():
        try:
            owner = pkgutil.resolve_name(module)
            patch.setattr(owner, name, quicker(getattr(owner, name)))
        except (ImportError, AttributeError):  # another torch, whose exporters are arranged otherwise
            continue
