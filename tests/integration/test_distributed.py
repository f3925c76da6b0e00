"""The seed's recipes with two processes, on a small folder of images: both processes end with the same model."""

import contextlib
import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file, save_file

from halfeven.cli.main import main
from halfeven.distributed import rank
from halfeven.training.trainer import Trainer
from processes import forked, run

from .running import environment

CONFIGS = Path(__file__).parents[2] / "configs" / "qat"
MODEL = "test_resnet"
"""The recipes' ResNet-18 takes several times as long."""


def train_and_keep(folder, *arguments):
    """Train as the command line does, and write down what this process ends with."""
    run = Trainer.run

    def run_and_keep(self, **options):
        outcome = run(self, **options)
        torch.save(self.model.state_dict(), f"{folder}/rank{rank()}.pt")
        return outcome

    Trainer.run = run_and_keep
    main(["train", *arguments])


SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from integration.test_distributed import train_and_keep
train_and_keep(*sys.argv[1:])
"""


def by_torchrun(folder, *arguments):
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [folder / "script.py", folder, *arguments]
    done = run(command, env=environment(), timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def as_torchrun_does(folder, *arguments):
    """With torchrun's variables, in processes that need not import everything first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    given = (port, folder, *map(str, arguments))
    mp.start_processes(_start, given, nprocs=2, start_method=forked().get_start_method())
    return "".join((folder / f"said{number}.txt").read_text() for number in range(2))


def _start(number, port, folder, *arguments):
    places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), COLUMNS="160")
    with open(folder / f"said{number}.txt", "w") as said, contextlib.redirect_stdout(said):
        train_and_keep(folder, *arguments)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of images: striped one way or the other, in random colours."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 9), ("val", 3)):
        for turn, name in enumerate(("across", "down")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                stripes = np.repeat(rng.integers(0, 255, (16, 1, 3), dtype=np.uint8), 16, axis=0).repeat(300, axis=1)
                Image.fromarray(np.swapaxes(stripes, 0, 1) if turn else stripes).save(root / part / name / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "float.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, num_classes=2).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("config", "start"),
    [
        ("qat_openvino_resnet18_10e_8xb32_in1k.py", as_torchrun_does),
        pytest.param("lsq_openvino_resnet18_8xb32_10e_in1k.py", by_torchrun, marks=pytest.mark.exhaustive),
    ],
    ids=["qat", "lsq"],
)
def test_both_processes_end_with_the_same_model(config, start, images, weights, tmp_path):
    changes = {
        "data.root": images,
        "data.workers": 0,
        "data.resize": 72,
        "data.image-size": 64,
        "data.calibration-samples": 4,
        "model.name": MODEL,
        "model.weights": weights,
        "model.num-classes": 2,
        "training.batch-size": 3,
        "training.epochs": 1,
        "training.learning-rate": 0.01,
        "device.threads": 1,
        "export.verify-samples": 4,
        "export.timed": False,
        "work-dir": tmp_path / "work",
    }
    words = [str(word) for name, value in changes.items() for word in (f"--{name}", value)]
    said = start(tmp_path, CONFIGS / config, "--auto-scale-lr", *words)

    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    before = load_file(weights)
    still = [name for name in before if name.endswith(".weight") and torch.equal(first[name], before[name])]
    assert not still, "every layer was trained"
    moved = not torch.equal(first["bn1.running_mean"], before["bn1.running_mean"])
    assert moved is config.startswith("qat"), (
        "BatchNorm follows the batches in the QAT recipe, and is frozen in the LSQ one"
    )
    lines = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "w8a8" in line] == [3]
    assert "scaled to 0.000234375" in said, "9 images a process, 3 at a time, 2 processes: 6 of the 256 the rate is for"
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert {"float", "simulated", "deployed"} <= results.keys()
