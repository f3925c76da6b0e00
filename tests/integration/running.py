"""Runs the command line in processes of its own."""

import os
import subprocess
import sys


def environment() -> dict[str, str]:
    """Without fused kernels, whose compilation takes longer than these runs; without the threads of other tests."""
    return {**os.environ, "HALFEVEN_COMPILE": "0", "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def halfeven(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "halfeven.cli", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
