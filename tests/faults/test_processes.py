"""Two processes: they stop together, go on together, and must see the same folder."""

import contextlib
import os
import signal
import socket

import pytest
import torch.multiprocessing as mp

from halfeven.cli.main import main
from halfeven.distributed import rank
from halfeven.training.state import load_state
from halfeven.training.trainer import Trainer
from processes import forked

from .tiny_run import differences


def pair(folder, work, *arguments, signalled=None):
    """Run the command line in two processes as torchrun starts them. Returns their exit codes and what they said."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder.mkdir()
    given = (port, folder, list(map(str, work)), signalled, *map(str, arguments))
    mp.start_processes(_start, given, nprocs=2, start_method=forked().get_start_method())
    said = [(folder / f"said{number}.txt").read_text() for number in range(2)]
    return [int((folder / f"code{number}.txt").read_text()) for number in range(2)], said


def _start(number, port, folder, work, signalled, *arguments):
    places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), COLUMNS="160")
    import halfeven.cli.work_folder as work_folder

    work_folder.SEEN_WITHIN_SECONDS = 1.0
    if signalled is not None:
        _signal_in(signalled)
    code = 0
    with (
        open(folder / f"said{number}.txt", "w") as said,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        try:
            main(["train", *arguments, "--work-dir", work[number]])
        except SystemExit as end:
            code = int(end.code or 0)
    (folder / f"code{number}.txt").write_text(str(code))


def _signal_in(step):
    """Let the second process get a signal in a step."""
    take = Trainer._take_step

    def take_and_signal(self, group):
        if rank() == 1 and self.step == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return take(self, group)

    Trainer._take_step = take_and_signal


SHORT = ("--export.verify-samples", "4", "--training.epochs", "2", "--training.batch-size", "2")


def assert_stops(config, folder, work):
    codes, said = pair(folder, [work, work], config, *SHORT, "--auto-resume", signalled=1)
    assert codes == [75, 75], said
    assert "Training in 2 processes, on cpu." in said[0]
    assert "Stopped by another process of this run" in said[0]
    assert "Stopped by SIGUSR1 at step" in said[1]
    assert load_state(work / "float" / "state.pt").step >= 2


def test_a_signal_to_one_stops_both_at_the_same_step(config, tmp_path):
    assert_stops(config, tmp_path / "said", tmp_path / "work")


@pytest.mark.exhaustive
def test_two_that_were_stopped_end_as_two_that_were_not(config, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert pair(tmp_path / "a", [whole, whole], config, *SHORT)[0] == [0, 0]
    assert_stops(config, tmp_path / "b", cut)
    assert pair(tmp_path / "c", [cut, cut], config, *SHORT, "--auto-resume")[0] == [0, 0]
    assert not differences(whole, cut)


def test_processes_that_see_different_folders_are_refused(config, tmp_path):
    codes, said = pair(tmp_path / "a", [tmp_path / "first", tmp_path / "second"], config)
    assert codes == [2, 2], said
    for text in said:
        assert "must name a folder on a disk that all of them share" in " ".join(text.split())
    assert not (tmp_path / "second").exists()
