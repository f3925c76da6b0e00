"""ONNX Runtime's own profile of a session: the time of each kernel, read from the file that it writes."""

import json
import re
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from halfeven.runtimes.layer_execution import KernelTime
from halfeven.temporary import temporary_folder

INTEGER_TYPES = ("int8", "uint8")

WARM_UP_RUNS = 1
"""Runs before, which allocate, and whose times do not count."""


def name_in_file(name: str) -> str:
    """Return the name that an operator of the optimized model has in the file.

    The optimizer adds "_token_" and a number to the names of nodes that it replaces, and the name of the fusion to
    that of a product of fixed sizes, which it joins with its bias.
    """
    return re.sub(r"(_token_\d+|/MatMulAddFusion)+$", "", name)


def kernel_times(
    profiled_session: Callable[[Path], Any], fed: Mapping[str, Any], runs: int, integer_kernels: tuple[str, ...]
) -> list[KernelTime]:
    """Return the median time of each kernel of a session over some runs, in the order in which they run.

    Args:
        profiled_session: makes a session that writes its profile to files of this name.
        fed: the inputs by name.
        runs: how many count.
        integer_kernels: operators that compute with integers and may return floats.
    """
    with temporary_folder() as folder:
        opened = profiled_session(folder / "profile")
        for _ in range(WARM_UP_RUNS + runs):
            opened.run(None, fed)
        events = json.loads(Path(opened.end_profiling()).read_text())
    kernels: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            kernels.setdefault(event["args"]["node_index"], []).append(event)
    return [_described(seen, integer_kernels) for seen in kernels.values()]


def _described(seen: list[dict[str, Any]], integer_kernels: tuple[str, ...]) -> KernelTime:
    """Return a kernel's time of the events of all runs."""
    event = seen[0]
    given = event["args"]
    kind = given["op_name"]
    name = name_in_file(event["name"].removesuffix("_kernel_time"))
    read = _tensor_types(given["input_type_shape"])
    made = _tensor_types(given["output_type_shape"])
    integer = kind in integer_kernels or {*read[:1], *made[:1]} <= set(INTEGER_TYPES)
    floats = (one for one in (*read, *made) if one.startswith("float"))
    precision = "int8" if integer else next(floats, "".join(made[:1]))
    milliseconds = statistics.median(event["dur"] for event in seen[WARM_UP_RUNS:]) / 1000
    return KernelTime(name, (name,), kind, "", precision, milliseconds, integer=integer)


def _tensor_types(described: list[dict[str, Any]]) -> list[str]:
    """Return the types of tensors, each described as a dict of its type and its sizes."""
    return ["float32" if name == "float" else name for one in described for name in one]
