"""Long work in one process: memory, files, threads and temporary files must stay flat, beside a control."""

import ctypes
import gc
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import halfeven as he
from faults.mutations import IMAGES, Net

from .runs import forked, waited
from .table import Campaign, Row

FIRST = 20
"""Rounds before the slope is measured: caches fill, and allocators settle."""
STEPS = 2000
READ_EVERY = 50
SECONDS = 4 * 3600
SIGMAS = 2.0
"""A slope counts as 0 within this many standard errors."""


def soak(campaign: Campaign) -> Row:
    """Take 2,000 training steps, and 60 rounds of prepare, calibrate, export and verify beside a control."""
    rounds = campaign.tries_of(60)
    steps = _apart(campaign.folder, "steps", lambda place: _read(_steps(), STEPS // READ_EVERY, place))
    ours = _apart(campaign.folder, "ours", lambda place: _read(_halfeven(place), rounds, place))
    control = _apart(campaign.folder, "control", lambda place: _read(_control(place), rounds, place))
    row = Row("soak", tries=3)
    slope, error = _slope(steps["memory"])
    row.notes.append(f"{STEPS} steps: {1000 * slope / READ_EVERY:+.2f} ± {1000 * error / READ_EVERY:.2f} KB a step")
    _judge(row, "steps", slope > SIGMAS * error and slope * len(steps["memory"]) > 1.0)
    mine, mine_error = _slope(ours["memory"])
    theirs, theirs_error = _slope(control["memory"])
    error = float(np.hypot(mine_error, theirs_error))
    row.notes.append(
        f"{rounds} rounds: {mine:+.3f} ± {mine_error:.3f} MB a round, control {theirs:+.3f} ± {theirs_error:.3f}"
    )
    _judge(row, "rounds", mine - theirs > SIGMAS * error)
    growing = [
        name for name in ("files", "threads", "temporary") if ours[name][-1] > ours[name][min(FIRST, rounds // 2)]
    ]
    row.notes.append(
        ", ".join(f"{name} {ours[name][0]:.0f} to {ours[name][-1]:.0f}" for name in ("files", "threads", "temporary"))
    )
    _judge(row, f"growing: {growing}", bool(growing))
    return row


def _judge(row: Row, name: str, lost: bool) -> None:
    row.survived += not lost
    row.lost += [name] if lost else []


def _apart(folder: Path, name: str, work: Callable[[Path], Any]) -> dict[str, list[float]]:
    place = folder / name
    place.mkdir()
    said = place / "said.txt"
    ended = waited(forked(lambda: work(place), said, place / "tmp"), said, SECONDS)
    if ended.code:
        raise SystemExit(f"The soak of {name} ended with {ended.code}:\n{ended.said[-3000:]}")
    found: dict[str, list[float]] = json.loads((place / "readings.json").read_text())
    return found


def _read(work: Callable[[], None], rounds: int, place: Path) -> None:
    readings: dict[str, list[float]] = {"memory": [], "files": [], "threads": [], "temporary": []}
    for _ in range(rounds):
        work()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free in the allocator is no leak
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        readings["memory"].append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        readings["files"].append(len(os.listdir("/proc/self/fd")))
        readings["threads"].append(len(os.listdir("/proc/self/task")))
        readings["temporary"].append(len(os.listdir(tempfile.gettempdir())))
    (place / "readings.json").write_text(json.dumps(readings))


def _slope(values: list[float]) -> tuple[float, float]:
    """Return the slope of readings by least squares, behind the first rounds, and its standard error."""
    behind = np.array(values[min(FIRST, len(values) // 2) :])
    if len(behind) < 3:
        return 0.0, float("inf")
    x = np.arange(len(behind)) - (len(behind) - 1) / 2
    slope = float((x * behind).sum() / (x * x).sum())
    residual = behind - behind.mean() - slope * x
    return slope, float(np.sqrt((residual**2).sum() / (len(behind) - 2) / (x * x).sum()))


def _halfeven(place: Path) -> Callable[[], None]:
    def work() -> None:
        qmodel = he.prepare(Net(), IMAGES, scheme="w7a8", batchnorm="fold")
        he.calibrate(qmodel, [IMAGES]).eval()
        for ending, target in ((".xml", "openvino"), (".onnx", "onnxruntime")):
            he.export(qmodel, place / f"model{ending}", target)
            he.verify(qmodel, place / f"model{ending}", [IMAGES], target=target, timed=False)

    return work


def _control(place: Path) -> Callable[[], None]:
    """Return the same work of torch and the runtimes alone: capture, convert, write, read, run."""
    import onnxruntime
    import openvino

    def work() -> None:
        model = Net().eval()
        program = torch.export.export(model, (IMAGES,))
        openvino.save_model(openvino.convert_model(program), place / "model.xml")
        compiled = openvino.Core().compile_model(place / "model.xml", "CPU")
        compiled([IMAGES.numpy()])
        torch.onnx.export(program, (), place / "model.onnx", dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(place / "model.onnx", providers=["CPUExecutionProvider"])
        session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})

    return work


def _steps() -> Callable[[], None]:
    qmodel = he.calibrate(he.prepare(Net(), IMAGES, ranges="learned"), [IMAGES]).train()
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=1e-3, momentum=0.9)
    labels = torch.arange(len(IMAGES)) % 3

    def work() -> None:
        for _ in range(READ_EVERY):
            optimizer.zero_grad()
            F.cross_entropy(qmodel(IMAGES), labels).backward()
            optimizer.step()

    return work
