"""Commands in processes of their own, forked from this one after its imports, and killed where a part wants it."""

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfeven.cli.main import main

SECONDS = 300
"""Limit for one command."""
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.chmod")
"""Python's audit events of operations on files."""
FORKS = 3
"""Largest number of forks for one process."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Ended:
    """The end of a command: its exit code (below 0: the signal that killed it), and the text that it printed."""

    code: int
    said: str


def nothing() -> None:
    """Prepare nothing."""


def _begun_fork() -> int:
    """Fork, and once more where the new process died within `fork` itself, before it could do anything.

    A process with the many threads of the runtimes was seen to end in a segmentation fault there, about once in a
    thousand times, which says nothing about halfeven. Returns as `os.fork` does.
    """
    for _ in range(FORKS):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writing, b"begun")
        os.close(writing)
        begun = pid == 0 or os.read(reading, 1)
        os.close(reading)
        if begun:
            return pid
        os.waitpid(pid, 0)
    raise SystemExit(f"{FORKS} processes died within fork, one after the other.")


def forked(function: Callable[[], Any], said: Path, temporary: Path) -> int:
    """Call a function in a forked process, which ends with its exit code as Python would. Returns the process's id.

    Args:
        function: what to do.
        said: file that receives all that is printed.
        temporary: the process's folder for temporary files.
    """
    temporary.mkdir(parents=True, exist_ok=True)
    pid = _begun_fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ["TMPDIR"] = str(temporary)
        tempfile.tempdir = None
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def waited(pid: int, said: Path, seconds: float = SECONDS) -> Ended:
    """Wait for a process; one that takes too long is killed and counts as -9 with a line that says so."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return Ended(os.waitstatus_to_exitcode(status), said.read_text(errors="replace"))
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return Ended(-signal.SIGKILL, f"{said.read_text(errors='replace')}\nHUNG: no end after {seconds:.0f} s")
        time.sleep(0.01)


def command(arguments: Sequence[object], place: Path, prepare: Callable[[], None] = nothing) -> Ended:
    """Run the command line to its end.

    Args:
        arguments: of the command line.
        place: folder for what it prints, and for its temporary files.
        prepare: called in its process first.
    """
    pid = start(arguments, place, prepare)
    return waited(pid, place / "said.txt")


def start(arguments: Sequence[object], place: Path, prepare: Callable[[], None] = nothing) -> int:
    """Start the command line, and go on. Returns the process's id."""
    place.mkdir(parents=True, exist_ok=True)

    def act() -> None:
        prepare()
        main([str(argument) for argument in arguments])

    return forked(act, place / "said.txt", place / "tmp")


def on_each_operation(folder: Path, act: Callable[[int], None]) -> None:
    """Call `act` with its number, from 1, before each operation of this process that writes in a folder."""
    count = 0
    inside = str(folder)

    def seen(path: object) -> None:
        nonlocal count
        if isinstance(path, str | bytes | os.PathLike) and os.fsdecode(path).startswith(inside):
            count += 1
            act(count)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and not (event == "open" and not (arguments[2] or 0) & WRITING):
            seen(arguments[0])

    sync = os.fsync

    def counted_sync(file: int) -> None:
        seen(os.readlink(f"/proc/self/fd/{file}"))
        sync(file)

    os.fsync = counted_sync
    sys.addaudithook(hook)


def killing_at(number: int, folder: Path) -> Callable[[], None]:
    """Return what lets a process die before its operation of this number."""

    def kill(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: on_each_operation(folder, kill)


def counting(folder: Path, result: Path) -> Callable[[], None]:
    """Return what lets a process write down how many operations it has done."""
    written = os.open(result, os.O_WRONLY | os.O_CREAT, 0o644)
    return lambda: on_each_operation(folder, lambda count: os.pwrite(written, str(count).encode(), 0) and None)


def killed_after(pid: int, seconds: float) -> bool:
    """Kill a process after some time. Returns False for one that had ended by itself."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, _ = os.waitpid(pid, os.WNOHANG)
        if done:
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def generator(seed: int, *place: object) -> random.Random:
    """Return the random numbers of one try."""
    return random.Random(f"{seed}/{'/'.join(map(str, place))}")
