"""Runs the command line: within this process, which has imported everything already, or in a process of its own."""

import contextlib
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess

import pytest
from accelerate.state import AcceleratorState

from halfeven.cli.main import main
from halfeven.quantization import compile as compilation
from processes import forked, run

COMMAND = (sys.executable, "-m", "halfeven.cli.main")
WITHOUT_KERNELS = {"HALFEVEN_COMPILE": "0"}
"""Fused kernels take longer to compile than these runs take."""
WIDE = {"COLUMNS": "160"}


def environment() -> dict[str, str]:
    """Of a process: without fused kernels, and without the threads of other tests."""
    return {**os.environ, **WITHOUT_KERNELS, **WIDE, "OMP_NUM_THREADS": "1"}


def halfeven(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process; the imports of one of its own would take most of a test's time."""
    command = [*COMMAND, *map(str, arguments)]
    out, err = io.StringIO(), io.StringIO()
    with _as_in_a_new_process(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = _status(command[len(COMMAND) :])
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a shell does."""
    command = [*COMMAND, *map(str, arguments)]
    return run(command, env=environment(), timeout=300)


def start(*arguments: object) -> ForkServerProcess:
    """Run the command line in a process of its own, and go on."""
    process = forked().Process(target=_run_silently, args=(list(map(str, arguments)),), daemon=True)
    process.start()
    return process


def _run_silently(arguments: list[str]) -> None:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        main(arguments)


@contextlib.contextmanager
def _as_in_a_new_process() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compilation, "_works", False)
        patch.setattr(sys, "path", [*sys.path])  # a config's folder is put there
        for name, value in WIDE.items():
            patch.setenv(name, value)
        yield


def _status(arguments: list[str]) -> int:
    """What the shell would see, and on stderr what a user would."""
    try:
        main(arguments)
    except SystemExit as end:
        return int(end.code or 0)
    except Exception:  # the interpreter would print it and end with 1
        traceback.print_exc()
        return 1
    return 0
