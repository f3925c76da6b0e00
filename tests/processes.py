"""Processes of their own for tests. A server imports the large packages once and forks, where each process would.

Tests start processes through the server alone. Workers of pytest-xdist have the hundred threads of the runtimes, and in
one of two whole runs a worker was lost to a segmentation fault within its own `fork`.
"""

import functools
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from typing import Any

import pytest

IMPORTED = ["halfeven.cli.main", "openvino", "onnxruntime", "sklearn.datasets", "timm", "torchmetrics", "torchvision"]
ENVIRONMENT = {"HALFEVEN_COMPILE": "0", "OMP_NUM_THREADS": "1"}
"""Without fused kernels, which take longer to compile than these processes take, and without others' threads."""


@functools.cache
def forked() -> ForkServerContext:
    """Return the context whose processes are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def in_a_process(function: Callable[..., Any], *arguments: Any, **environment: str) -> Any:
    """Return what a module's function returns in a process with these variables in its environment."""
    with ProcessPoolExecutor(1, forked(), _settle, (environment,)) as process:
        return process.submit(function, *arguments).result()


def run(command: Sequence[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as `subprocess.run` does, with its output as text."""
    options = {"env": dict(os.environ), "cwd": os.getcwd(), "capture_output": True, "text": True} | options
    return in_a_process(functools.partial(subprocess.run, list(map(str, command)), **options))


def _settle(environment: dict[str, str]) -> None:
    os.environ.update(environment)
