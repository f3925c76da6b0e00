"""Stop at a safe point when a scheduler asks for it: Slurm, Kubernetes and torchrun send a signal before they kill."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from halfeven.distributed import is_distributed, smallest
from halfeven.errors import Interruption

EXIT_CODE = 75
"""Exit code of a command that a signal has stopped: EX_TEMPFAIL of sysexits.h, "try again later"."""
SIGNALS = ("SIGTERM", "SIGUSR1")
AGREE_SECONDS = 1.0
"""Seconds between exchanges in which the processes of a run agree to stop."""
WORKER_SECONDS = 60
"""Seconds that a process which reads samples lives on after SIGTERM, for the training to take its last step."""


class StopRequested(Interruption):
    """A signal has asked the command to stop.

    Args:
        reason: what has asked, "SIGTERM" for example.
        step: the step whose state was saved for it; None outside of training.
    """

    def __init__(self, reason: str, step: int | None = None) -> None:
        self.reason = reason
        self.step = step
        saved = "" if step is None else f" at step {step}, which is saved"
        super().__init__(
            f"Stopped by {reason}{saved}. The same command with --resume or --auto-resume continues from the last "
            "saved state."
        )


@dataclass
class _Asked:
    """The signals of this process; there is one set of them for the whole process."""

    process: int = 0
    """Number of the process whose command can be stopped; 0: none. Processes forked from it go their own way."""
    deferred: bool = False
    """Signals wait for a safe point."""
    reason: str = ""
    """Name of the first signal that waits."""


_asked = _Asked()


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `StopRequested` within the context when one of `SIGNALS` arrives.

    A handler that the program has set itself is left alone, and so are threads beside the main one, which get no
    signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    mine = [number for number in mine if signal.getsignal(number) == signal.SIG_DFL]
    _asked.process = os.getpid()
    _asked.reason = ""
    for number in mine:
        signal.signal(number, _on_signal)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)
        _asked.process = 0


def _on_signal(number: int, frame: Any) -> None:
    if os.getpid() != _asked.process:
        return
    name = signal.Signals(number).name
    if not _asked.deferred:
        raise StopRequested(name)
    # Schedulers repeat themselves: torchrun passes a signal on, and sends SIGTERM after it. The first one counts.
    _asked.reason = _asked.reason or name


class SafePoints:
    """The points of a training, after each step, at which all processes of a run may agree to stop."""

    def __init__(self) -> None:
        self._next = 0
        self._step = 0
        self._seconds = time.monotonic()

    def reason(self, step: int, device: torch.device | str, *, exchange: bool = False) -> str:
        """Return why to stop after a step; "" to go on. Every process calls this after the same steps.

        Args:
            step: number of steps taken.
            device: where the processes exchange tensors.
            exchange: True to exchange at this step, however long ago the last exchange was.
        """
        if not is_distributed():
            return _asked.reason
        if step < self._next and not exchange:
            return ""
        # A signal reaches the processes at different steps, and reading what was exchanged waits for the device: so
        # they exchange once a second, after as many steps as the slowest of them takes in that time.
        now = time.monotonic()
        pace = (step - self._step) / max(now - self._seconds, 1e-6)
        self._step = step
        self._seconds = now
        self._next = step + smallest(max(1, int(pace * AGREE_SECONDS)), device)
        stop = smallest(0 if _asked.reason else 1, device) == 0
        return (_asked.reason or "another process of this run, which was asked to stop") if stop else ""


@contextmanager
def deferred() -> Iterator[SafePoints]:
    """Make signals wait, within the context, for the next safe point."""
    _asked.deferred = True
    try:
        yield SafePoints()
    finally:
        _asked.deferred = False
    # It came behind the last safe point. With several processes the next training, or its end, honours it.
    if _asked.reason and not is_distributed():
        raise StopRequested(_asked.reason)


def init_worker(number: int) -> None:
    """Prepare a process that reads samples: signals for all processes of a job leave it to the training to stop.

    Args:
        number: of the worker, from 0; DataLoader gives it.
    """
    if not _asked.process:
        return
    for name in SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        # DataLoader itself ends a worker that hangs by SIGTERM, which must work in the end.
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))
