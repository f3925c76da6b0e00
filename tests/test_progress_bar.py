"""Long work shows a bar in a terminal, and nothing anywhere else."""

import contextlib
import io
import threading
import time

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven import progress_bar
from halfeven.progress_bar import count_of, progress

IMAGES = torch.randn(2, 3, 8, 8)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    """What is written to stderr, a terminal."""
    monkeypatch.setattr(progress_bar, "SECONDS_BEFORE", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("CI", "HALFEVEN_PROGRESS", "NO_COLOR", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal()


def slow(loader):
    for batch in loader:
        time.sleep(0.15)
        yield batch


def work(tmp_path):
    qmodel = he.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), IMAGES)
    he.calibrate(qmodel, slow([IMAGES] * 2))
    he.export(qmodel, tmp_path / "m.xml")
    he.verify(qmodel, tmp_path / "m.xml", [IMAGES], timed=False)
    return qmodel


def test_calibrate_export_and_verify_show_a_bar(terminal, tmp_path):
    with contextlib.redirect_stderr(terminal):  # in the test: pytest sets its own stream after the fixtures
        work(tmp_path)
    for what in ("Calibrating", "Writing m.xml", "Verifying m.xml"):
        assert what in terminal.getvalue()
    # rich tells its thread to end and does not wait for it.
    left = [thread for thread in threading.enumerate() if type(thread).__name__ in ("Timer", "_RefreshThread")]
    for thread in left:
        thread.join(10)
    assert not any(thread.is_alive() for thread in left)


@pytest.mark.parametrize("quiet", ["pipe", "switch", "dumb", "no stderr", "thread"])
def test_nothing_is_shown_elsewhere(terminal, monkeypatch, quiet):
    stream = None if quiet == "no stderr" else terminal
    if quiet == "pipe":
        monkeypatch.setattr(terminal, "isatty", lambda: False)
        monkeypatch.setenv("FORCE_COLOR", "1")
    if quiet == "switch":
        monkeypatch.setenv("HALFEVEN_PROGRESS", "0")
    if quiet == "dumb":
        monkeypatch.setenv("TERM", "dumb")

    def act():
        with contextlib.redirect_stderr(stream), progress("Working", 2) as advance:
            time.sleep(0.1)
            advance()

    if quiet == "thread":
        thread = threading.Thread(target=act)
        thread.start()
        thread.join()
    else:
        act()
    assert not terminal.getvalue()


def fail(terminal):
    with contextlib.redirect_stderr(terminal), progress("Outer"), progress("Inner", 3) as advance:
        time.sleep(0.1)
        advance()
        raise ValueError("no")


def test_a_bar_within_a_bar_is_not_shown_and_the_next_one_is(terminal):
    with pytest.raises(ValueError, match="no"):
        fail(terminal)
    with contextlib.redirect_stderr(terminal), progress("Next"):
        time.sleep(0.1)
    said = terminal.getvalue()
    assert "Outer" in said
    assert "Next" in said
    assert "Inner" not in said


def test_short_work_shows_none(terminal, monkeypatch):
    monkeypatch.setattr(progress_bar, "SECONDS_BEFORE", 30.0)
    with contextlib.redirect_stderr(terminal), progress("Short", 1) as advance:
        advance()
    assert not terminal.getvalue()


def test_loaders_of_known_and_unknown_length():
    class Odd:
        def __len__(self):
            raise TypeError("no length")

    assert count_of([1, 2, 3]) == 3
    assert count_of([1, 2, 3], 2) == 2
    assert count_of(iter([1])) is None
    assert count_of(Odd()) is None
