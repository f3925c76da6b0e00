"""Jobs that are restarted: a signal saves and stops, the same command goes on, and the end is the same to the bit."""

import os
import signal
import time

import pytest

from halfeven.training import stopping
from halfeven.training.state import load_state
from halfeven.training.stopping import EXIT_CODE, StopRequested, deferred, stoppable
from halfeven.training.trainer import Trainer
from integration.running import halfeven
from processes import in_a_process
from runtimes.parity import SCHEME

from .tiny_run import differences, log_lines

SHORT = ("--export.verify-samples", "4")


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halfeven.quantization.compile._works", False)
        done = halfeven("train", config, "--work-dir", folder, *SHORT, "--auto-resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Training in 1 process, on cpu." in done.stdout
    return folder


def signalled_at(monkeypatch, name, step, number):
    """Send this process a signal in a step of the training of a name."""
    take = Trainer._take_step

    def take_and_signal(self, group):
        if self.where.name == name and self.step == step:
            os.kill(os.getpid(), number)
        return take(self, group)

    monkeypatch.setattr(Trainer, "_take_step", take_and_signal)


@pytest.mark.parametrize(
    ("name", "step", "number"),
    [
        pytest.param("float", 2, signal.SIGTERM, marks=pytest.mark.exhaustive),
        pytest.param(SCHEME, 0, signal.SIGTERM, marks=pytest.mark.exhaustive),
        (SCHEME, 5, signal.SIGUSR1),
    ],
)
def test_a_signal_saves_the_step_it_meets_and_the_same_command_goes_on(
    config, whole, tmp_path, monkeypatch, name, step, number
):
    command = ("train", config, "--work-dir", tmp_path, *SHORT, "--auto-resume")
    signalled_at(monkeypatch, name, step, number)
    done = halfeven(*command)
    assert done.returncode == EXIT_CODE == 75
    assert f"Stopped by {number.name} at step {step + 1}, which is saved." in done.stderr
    folder = tmp_path / "float" if name == "float" else tmp_path
    assert load_state(folder / "state.pt").step == step + 1
    assert signal.getsignal(number) == signal.SIG_DFL
    monkeypatch.undo()
    monkeypatch.setattr("halfeven.quantization.compile._works", False)
    done = halfeven(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not differences(whole, tmp_path, one_process=True)


def test_a_run_that_is_resumed_at_step_0_keeps_its_first_lines(config, whole, tmp_path, monkeypatch):
    take = Trainer._take_step

    def die(self, group):
        if self.where.name == SCHEME:
            raise SystemExit(9)
        return take(self, group)

    monkeypatch.setattr(Trainer, "_take_step", die)
    command = ("train", config, "--work-dir", tmp_path, *SHORT, "--auto-resume")
    assert halfeven(*command).returncode == 9
    assert load_state(tmp_path / "state.pt").step == 0
    first = log_lines(tmp_path)
    assert [set(line) - {"step", "epoch"} for line in first] == [{"float"}, {f"{SCHEME}, calibrated"}]
    monkeypatch.undo()
    monkeypatch.setattr("halfeven.quantization.compile._works", False)
    assert halfeven(*command).returncode == 0
    assert log_lines(tmp_path)[:2] == first
    assert not differences(whole, tmp_path, one_process=True)


def test_outside_of_training_a_signal_stops_at_once(config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "halfeven.cli.ptq._quantize_and_save", lambda *_: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(9))
    )
    done = halfeven("ptq", config, "--work-dir", tmp_path)
    assert done.returncode == EXIT_CODE
    assert "Stopped by SIGTERM. The same command with --resume" in done.stderr


def test_the_first_of_several_signals_counts_and_none_is_too_many():
    def stop_three_times():
        with stoppable(), deferred() as points:
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert points.reason(1, "cpu") == "SIGTERM"

    with pytest.raises(StopRequested, match="SIGTERM"):
        stop_three_times()


def test_a_signal_behind_the_last_safe_point_is_not_forgotten():
    with stoppable(), pytest.raises(StopRequested, match="SIGTERM"), deferred():
        os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_of_the_program_stay(monkeypatch):
    got = []
    before = signal.signal(signal.SIGUSR1, lambda *_: got.append("mine"))
    with stoppable():
        os.kill(os.getpid(), signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)
    assert got == ["mine"]


def seconds_left_after_signals():
    with stoppable():
        stopping.init_worker(0)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        return signal.alarm(0)


def test_processes_that_read_samples_outlive_a_signal_for_all():
    assert in_a_process(seconds_left_after_signals) > 50


def test_another_precision_is_another_run(config, whole):
    done = halfeven("train", config, "--work-dir", whole, *SHORT, "--resume", "--device.precision", "bfloat16")
    assert done.returncode == 2
    assert 'device.precision was "float32" and is "bfloat16"' in " ".join(done.stderr.split())


@pytest.mark.parametrize("other", ["--resume", "--overwrite"])
def test_arguments_that_contradict_each_other_are_refused(config, tmp_path, other):
    done = halfeven("train", config, "--work-dir", tmp_path / "work", "--auto-resume", other)
    assert done.returncode == 2
    assert "only one of them can decide" in " ".join(done.stderr.split())
    assert not (tmp_path / "work").exists()
