"""The seed's recipe under torchrun with two processes, on a small folder of images: both end with the same model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from .running import environment

CONFIGS = Path(__file__).parents[2] / "configs" / "qat"

SCRIPT = '''
"""Trains as the command line does, and writes down what each process ends with."""
import sys, torch
from halfeven.cli.main import main
from halfeven.distributed import rank
from halfeven.training.trainer import Trainer

run = Trainer.run
def run_and_keep(self, **options):
    outcome = run(self, **options)
    torch.save(self.model.state_dict(), f"{sys.argv[1]}/rank{rank()}.pt")
    return outcome

Trainer.run = run_and_keep
main(["train", *sys.argv[2:]])
'''


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
    save_file(timm.create_model("resnet18", num_classes=2).state_dict(), path)
    return path


@pytest.mark.parametrize(
    "config", ["qat_openvino_resnet18_10e_8xb32_in1k.py", "lsq_openvino_resnet18_8xb32_10e_in1k.py"], ids=["qat", "lsq"]
)
def test_both_processes_end_with_the_same_model(config, images, weights, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    changes = {
        "data.root": images,
        "data.workers": 0,
        "data.resize": 72,
        "data.image-size": 64,
        "data.calibration-images": 4,
        "model.weights": weights,
        "model.num-classes": 2,
        "training.batch-size": 3,
        "training.epochs": 1,
        "training.learning-rate": 0.01,
        "export.verify-images": 4,
        "export.timed": False,
        "work-dir": tmp_path / "work",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path), str(CONFIGS / config), "--auto-scale-lr"]
    command += [str(word) for name, value in changes.items() for word in (f"--{name}", value)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]

    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    start = load_file(weights)
    still = [name for name in start if name.endswith(".weight") and torch.equal(first[name], start[name])]
    assert not still, "every layer was trained"
    moved = not torch.equal(first["bn1.running_mean"], start["bn1.running_mean"])
    assert moved is config.startswith("qat"), (
        "BatchNorm follows the batches in the QAT recipe, and is frozen in the LSQ one"
    )
    lines = [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "w8a8" in line] == [3]
    assert "scaled to 0.000234375" in done.stdout, (
        "9 images a process, 3 at a time, 2 processes: 6 of the 256 the rate is for"
    )
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert {"float", "simulated", "deployed"} <= results.keys()
