"""Temporary folders: deleted at their end, or, where their process was killed, by the next process."""

import os
import signal
import tempfile

import pytest

from halfeven.temporary import TemporaryFolder, temporary_folder
from processes import forked


def work_and_die(parent):
    (TemporaryFolder(str(parent)).path / "1.pt").write_text("activations")
    os.kill(os.getpid(), signal.SIGKILL)


def killed(parent):
    """Leave the folder of a process that was killed."""
    process = forked().Process(target=work_and_die, args=(parent,), daemon=True)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = parent.iterdir()
    return left


def work_on(parent, path):
    other = TemporaryFolder(str(parent))
    path.send(other.path)
    signal.pause()


def test_the_folder_of_a_killed_process_is_deleted_by_the_next(tmp_path):
    left = killed(tmp_path)
    assert (left / "1.pt").is_file()
    with temporary_folder(str(tmp_path)) as folder:
        assert folder.is_dir()
        assert not left.exists()
    assert not list(tmp_path.iterdir())


def test_folders_in_use_stay(tmp_path):
    mine = TemporaryFolder(str(tmp_path))
    reader, writer = forked().Pipe()
    process = forked().Process(target=work_on, args=(tmp_path, writer), daemon=True)
    process.start()
    writer.close()  # a process that dies is an error here, rather than a wait
    path = reader.recv()
    with temporary_folder(str(tmp_path)):
        assert mine.path.is_dir()
        assert os.path.isdir(path)
    process.kill()
    process.join()
    with temporary_folder(str(tmp_path)):
        assert not os.path.isdir(path)
    mine.delete()
    mine.delete()
    assert not list(tmp_path.iterdir())


def test_folders_of_another_kind_and_links_stay(tmp_path):
    foreign = tmp_path / "halfeven-notes"
    foreign.mkdir()
    (foreign / "text").write_text("mine")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    trap = tmp_path / "halfeven-trap"
    trap.mkdir()
    (trap / ".lock").symlink_to(elsewhere / "precious")
    with temporary_folder(str(tmp_path)):
        pass
    assert (foreign / "text").is_file()
    assert (elsewhere / "precious").is_file()
    assert trap.is_dir()


def test_the_systems_folder_is_used_and_a_missing_one_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with temporary_folder() as folder:
        assert folder.parent == tmp_path
    with pytest.raises(FileNotFoundError):
        TemporaryFolder(str(tmp_path / "missing"))
