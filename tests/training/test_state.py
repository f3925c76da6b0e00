"""The training state is whole at every moment, and refused where it does not belong."""

import os
import stat

import pytest
import torch

from halfeven.errors import CheckpointError
from halfeven.files import write_atomically
from halfeven.training.state import TrainingState, check_position, load_state, save_state


def state(**changes):
    values = dict(model={"w": torch.arange(3.0)}, optimizer={"state": {0: {"m": torch.ones(2)}}}, scaler={}, step=7)
    values |= dict(best={"top1": 1.0}, last={"top1": 0.5}, position={"seed": 0}, header='{"plan": 1}')
    return TrainingState(**values | changes)


def test_a_saved_state_is_loaded_as_it_was(tmp_path):
    save_state(state(), tmp_path / "deep" / "state.pt")
    found = load_state(tmp_path / "deep" / "state.pt")
    assert torch.equal(found.model["w"], torch.arange(3.0))
    assert torch.equal(found.optimizer["state"][0]["m"], torch.ones(2))
    assert (found.step, found.best, found.last, found.header) == (7, {"top1": 1.0}, {"top1": 0.5}, '{"plan": 1}')


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.pt"
    save_state(state(step=1), path)

    def fail(partial):
        partial.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert os.listdir(tmp_path) == ["state.pt"], "nothing is left of the failed write"
    assert load_state(path).step == 1
    save_state(state(step=2), path)
    assert load_state(path).step == 2
    assert os.listdir(tmp_path) == ["state.pt"], "nothing is left beside the file"


def test_the_file_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(stat.S_ISDIR(os.fstat(descriptor).st_mode)))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    write_atomically(tmp_path / "file", lambda partial: partial.write_bytes(b"x"))
    assert done == [False, "replace", True]


def test_others_may_read_it(tmp_path):
    write_atomically(tmp_path / "file", lambda partial: (partial.write_bytes(b"x"), partial.chmod(0o600)))
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no run to resume"),
        (b"PK\x03\x04cut", "is damaged: its end is missing.*cannot be resumed"),
        ({"format": 99}, "format 99"),
        ([1], "format list"),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    path = tmp_path / "state.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_state(path)


def test_another_position_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="batch_size 8 then, 16 now"):
        check_position({"seed": 0, "batch_size": 8}, {"seed": 0, "batch_size": 16}, tmp_path)
