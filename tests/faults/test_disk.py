"""Full disks, damaged and occupied folders: a message that says what, where and what is safe; old files stay whole."""

import errno
import os
import resource
import shutil
import stat
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import halfeven as he
from halfeven.cli.lock import locked
from halfeven.errors import CheckpointError, StorageError
from halfeven.files import storage_error, write_atomically
from halfeven.training.progress import RunLog, plain_console
from integration.running import halfeven
from processes import forked

LIMIT = 3000
"""Largest file, in bytes, that a process may write on a "full disk"."""


@contextmanager
def full_disk(limit=LIMIT):
    """No file may grow beyond a limit, as on a disk with no more room: each library meets it in its own way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python would cut what it compiles at the limit, without noticing, and fail at every later import of that module.
    writes_none, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        sys.dont_write_bytecode = writes_none


@pytest.fixture(scope="module")
def qmodel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3))
    images = torch.randn(2, 3, 8, 8)
    return he.calibrate(he.prepare(model, images), [images]).eval()


WRITERS = {
    "torch.save": lambda path, qmodel: write_atomically(path, lambda p: torch.save(torch.randn(5000), p)),
    "safetensors": lambda path, qmodel: write_atomically(path, lambda p: save_file({"a": torch.randn(5000)}, p)),
    "text": lambda path, qmodel: write_atomically(path, lambda p: p.write_text("x" * 10000)),
    "checkpoint": lambda path, qmodel: he.save(qmodel, path),
    "model.xml": lambda path, qmodel: he.export(qmodel, path),
    "model.onnx": lambda path, qmodel: he.export(qmodel, path, "onnxruntime"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_a_message_and_the_old_file_stays(tmp_path, qmodel, writer):
    path = tmp_path / (writer if "." in writer else f"{writer}.bin")
    path.write_text("old")
    with full_disk(), pytest.raises(StorageError) as error:
        WRITERS[writer](path, qmodel)
    assert str(path.parent) in str(error.value)
    assert "MB are free" in str(error.value)
    assert f"error {errno.EFBIG}" in str(error.value)
    assert "leave_out" not in str(error.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name], "nothing is left beside it"


def test_a_library_that_keeps_the_reason_to_itself_is_asked_before_its_file_goes(tmp_path, monkeypatch):
    """When its half of a file is deleted, there may be room again."""

    def write(path):
        path.write_bytes(b"half")
        raise RuntimeError("unexpected pos")

    def refusal(folder):
        return OSError(errno.ENOSPC, "full") if (folder / "file").is_file() else None

    monkeypatch.setattr("halfeven.files._refused_small_file", refusal)
    with pytest.raises(StorageError, match="disk is full"):
        write_atomically(tmp_path / "file", write)
    monkeypatch.setattr("halfeven.files._refused_small_file", lambda folder: None)
    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_atomically(tmp_path / "file", write)


@pytest.mark.parametrize("name", ["model.xml", "model.onnx"])
def test_exports_are_on_the_disk_and_may_be_read_by_all(tmp_path, qmodel, name, monkeypatch):
    synced = []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(os.readlink(f"/proc/self/fd/{file}")), sync(file)))
    he.export(qmodel, tmp_path / name, "openvino" if name.endswith("xml") else "onnxruntime")
    mask = os.umask(0)
    os.umask(mask)
    written = sorted(tmp_path.iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in written} == {0o666 & ~mask}
    assert {path.name for path in written} <= {os.path.basename(name) for name in synced}
    assert synced[-1] == str(tmp_path), "the folder too, after the files have their names"


class Killed(BaseException):
    """Stands for the end of the process."""


def die(*paths):
    raise Killed


def test_what_a_killed_export_has_left_is_gone_after_the_next(tmp_path, qmodel, monkeypatch):
    he.export(qmodel, tmp_path / "model.xml")
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            he.export(qmodel, tmp_path / "model.xml")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == whole
    assert len(list(tmp_path.iterdir())) == 3, "the folder of the killed export is there"
    he.export(qmodel, tmp_path / "model.xml")
    assert {path.name for path in tmp_path.iterdir()} == whole.keys()


def test_a_link_in_the_place_of_the_partial_file_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "file").write_text("precious")
    for target in (victim, victim / "file"):
        (tmp_path / ".file.partial").symlink_to(target)
        write_atomically(tmp_path / "file", lambda path: path.write_text("new"))
        assert (tmp_path / "file").read_text() == "new"
        assert not (tmp_path / ".file.partial").is_symlink()
    assert (victim / "file").read_text() == "precious"
    assert stat.S_IMODE(victim.stat().st_mode) == 0o700


def write_curves(log):
    for step in range(10_000):
        log.histograms(step, {"scale": torch.rand(1000)})


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_curves_on_a_full_disk_are_a_message_alone(tmp_path):
    """TensorBoard writes in a thread of its own, whose error Python would print."""
    hook = threading.excepthook
    log = RunLog(tmp_path, "run", total=1, step=0, resumed=False, console=plain_console(quiet=True), main=True)
    with full_disk():
        with pytest.raises(StorageError, match="tensorboard"):
            write_curves(log)
        with pytest.raises(StorageError, match="tensorboard"):
            log.close()
    assert threading.excepthook is hook


@pytest.mark.parametrize("command", ["train", "ptq"])
def test_the_commands_say_that_the_disk_is_full(config, tmp_path, command):
    with full_disk():
        done = halfeven(command, config, "--work-dir", tmp_path)
    assert done.returncode == 2
    assert "StorageError" in done.stderr
    assert ".partial" not in done.stderr
    assert "Traceback" not in done.stderr
    assert "a run can be resumed" in " ".join(done.stderr.split())
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_the_place_of_the_folder(config, tmp_path, place):
    (tmp_path / "file").write_text("")
    done = halfeven("train", config, "--work-dir", tmp_path / place)
    assert done.returncode == 2, done.stderr
    assert "a file stands where a folder belongs" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_errors_of_the_system_without_a_name_are_told_too():
    said = str(storage_error(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))))
    assert "quota" in said
    assert "MB are free" in said


@pytest.mark.parametrize("damage", [b"{", b"", b"[1]"])
@pytest.mark.parametrize("part", ["run.json", "*.safetensors"])
def test_damaged_blocks_of_a_reconstruction_are_a_message(tmp_path, part, damage):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    data = [torch.randn(4, 1, 6, 6)]
    options = {"reconstruct": "layers", "iterations": 2, "resume_dir": tmp_path}
    he.quantize(model, data, **options)
    next(tmp_path.glob(part)).write_bytes(damage)
    message = "another reconstruction" if damage == b"[1]" and part == "run.json" else "damaged .* Delete the folder"
    with pytest.raises(CheckpointError, match=message):
        he.quantize(model, data, **options)


def test_a_path_is_printed_as_it_is(config, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    folder = tmp_path / "[bold]x[" / "bold][" / "red] :smile:"
    short = ["--work-dir", folder, "--pretraining.epochs", "1", "--training.epochs", "1"]
    done = halfeven("train", config, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "results.json").is_file()
    done = halfeven("train", config, *short, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Resumed {folder / 'state.pt'}" in done.stdout.replace("\n", "")
    done = halfeven("train", config, *short)
    assert str(folder) in done.stderr


def hold(folder, held):
    with locked(folder, print):
        held.set()
        time.sleep(60)


def test_a_second_run_in_a_folder_is_refused_until_the_first_is_dead(config, tmp_path):
    held = forked().Event()
    process = forked().Process(target=hold, args=(tmp_path, held), daemon=True)
    process.start()
    assert held.wait(60)
    done = halfeven("train", config, "--work-dir", tmp_path)
    assert done.returncode == 2
    assert f"is in use by process {process.pid} on" in " ".join(done.stderr.split())
    assert os.listdir(tmp_path) == [".lock"], "the second has written nothing"
    process.kill()
    process.join()
    with locked(tmp_path, print):
        assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()
    assert not os.listdir(tmp_path)
