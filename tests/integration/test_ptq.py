"""ptq, from a config to a verified file; interrupted and resumed; and the recipes on folders of made-up images."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from runtimes.parity import SCHEME
from sweeps import sweep

from .running import halfeven, start

CONFIGS = Path(__file__).parents[2] / "configs" / "ptq"
RECONSTRUCTION = ("--quantization.scheme", "w4a8", "--ptq.reconstruct", "layers", "--ptq.iterations")


@pytest.fixture(scope="module")
def float_weights(config, trained) -> Path:
    """The weights that the small experiment trains, so that nothing has to be trained here."""
    return trained[0] / "float" / "best.safetensors"


def ptq(config, folder, weights, *options):
    """Run ptq on the small experiment with given float weights."""
    given = ("--pretraining.epochs", "0", "--model.weights", weights, "--work-dir", folder)
    return halfeven("ptq", config, *given, *options)


@pytest.fixture(scope="module")
def quantized(config, float_weights, tmp_path_factory):
    """The work folder of a whole ptq run, and what it said."""
    folder = tmp_path_factory.mktemp("ptq") / "work"
    done = ptq(config, folder, float_weights)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_ptq_delivers_and_shows_everything(quantized):
    folder, said = quantized
    for name in ("best.safetensors", "model.xml", "model.bin", "experiment.json", "results.json"):
        assert (folder / name).is_file(), name
    assert said.index(f"Plan for openvino, {SCHEME}") < said.index("Quantized in") < said.index("Exporting")
    results = json.loads((folder / "results.json").read_text())
    assert abs(results["deployed"]["top1"] - results["float"]["top1"]) < 10
    assert results["quantization_seconds"] > 0
    verification = results["verification"]["model.xml"]
    assert verification["integer_layers"] == verification["quantizable_layers"] == 3
    assert verification["integer_match"] == 1.0
    for row in ("float", "simulated", "deployed"):
        assert f"{results[row]['top1']:.2f}" in said


def test_the_checkpoint_can_be_tested_and_exported(config, quantized, tmp_path):
    folder = quantized[0]
    results = json.loads((folder / "results.json").read_text())
    checkpoint = shutil.copy(folder / "best.safetensors", tmp_path)
    no_weights = ("--pretraining.epochs", "0")
    done = halfeven("test", config, checkpoint, *no_weights, "--json", tmp_path / "t.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "t.json").read_text()) == {k: results[k] for k in ("float", "simulated", "deployed")}
    done = halfeven("export", config, checkpoint, *no_weights, "--export.formats", "onnx")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "verification.json").read_text())["model.onnx"]
    assert report["integer_match"] == 1.0


def test_a_run_that_has_ended_is_delivered_again(config, float_weights, quantized, tmp_path):
    folder = shutil.copytree(quantized[0], tmp_path / "work")
    (folder / "model.xml").unlink()
    done = ptq(config, folder, float_weights, "--resume")
    assert done.returncode == 0, done.stderr
    assert "Quantized in" not in done.stdout
    before, after = (json.loads((where / "results.json").read_text()) for where in (quantized[0], folder))
    assert {k: after[k] for k in after if k != "verification"} == {k: before[k] for k in before if k != "verification"}
    assert (folder / "model.xml").is_file()


def test_the_float_model_is_trained_where_the_config_says_so(config, tmp_path):
    done = halfeven("ptq", config, "--pretraining.epochs", "1", "--work-dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    with safe_open(tmp_path / "best.safetensors", "pt") as file:
        recorded = json.loads(file.metadata()["extra"])["float"]
    assert recorded == json.loads((tmp_path / "results.json").read_text())["float"]
    assert (tmp_path / "float" / "best.safetensors").is_file()


def test_killed_and_resumed_equals_uninterrupted(config, float_weights, tmp_path):
    """Killed once something of the reconstruction is stored, ptq goes on there and ends with the same integers."""
    iterations = "300"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = ptq(config, whole, float_weights, *RECONSTRUCTION, iterations)
    assert done.returncode == 0, done.stdout + done.stderr

    given = ("--pretraining.epochs", "0", "--model.weights", float_weights, "--work-dir", cut)
    process = start("ptq", config, *given, *RECONSTRUCTION, iterations)
    deadline = time.monotonic() + 120
    while not stored(cut) and process.is_alive():
        assert time.monotonic() < deadline, "nothing was stored"
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (cut / "best.safetensors").exists(), "the kill came too late to interrupt anything"

    done = ptq(config, cut, float_weights, *RECONSTRUCTION, iterations, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (cut / "ptq_state").exists(), "the checkpoint has it all"
    first, second = (load_file(folder / "best.safetensors") for folder in (whole, cut))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []

    # Killed once more, after the checkpoint and before the state was removed.
    (cut / "ptq_state").mkdir()
    done = ptq(config, cut, float_weights, *RECONSTRUCTION, iterations, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (cut / "ptq_state").exists()


def stored(folder):
    """Whether the reconstruction has stored a layer."""
    return any((folder / "ptq_state").glob("*.safetensors"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of images: striped one way or the other, in random colours."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for turn, name in enumerate(("across", "down")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                stripes = np.repeat(rng.integers(0, 255, (10, 1, 3), dtype=np.uint8), 8, axis=0).repeat(90, axis=1)
                Image.fromarray(np.swapaxes(stripes, 0, 1) if turn else stripes).save(root / part / name / f"{i}.jpg")
    return root


@pytest.mark.parametrize(
    ("name", "model"),
    sweep(
        (
            *(("resnet18", model) for model in ("test_resnet", "resnet18")),
            ("resnet50", "resnet50"),
            ("mbv2", "mobilenetv2_100"),
        ),
        ("resnet18", "test_resnet"),
    ),
)
def test_recipes_on_a_folder_of_images(name, model, images, tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model(model, num_classes=2).state_dict(), tmp_path / "float.safetensors")
    changes = {
        "data.root": images,
        "data.workers": 0,
        "data.resize": 40,
        "data.image-size": 32,
        "data.calibration-samples": 8,
        "model.name": model,
        "model.weights": tmp_path / "float.safetensors",
        "model.num-classes": 2,
        "quantization.scheme": SCHEME,
        "export.verify-samples": 8,
        "export.timed": False,
        "work-dir": tmp_path / "work",
    }
    options = [word for field, value in changes.items() for word in (f"--{field}", value)]
    done = halfeven("ptq", CONFIGS / f"ptq_openvino_{name}_8xb32_in1k_calib32xb32.py", *options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    results = json.loads((tmp_path / "work" / "results.json").read_text())
    assert list(results)[:3] == ["float", "simulated", "deployed"]
    verification = results["verification"]["model.xml"]
    assert verification["weights_match"]
    assert verification["integer_match"] == 1.0, verification["first_difference"]
    assert verification["integer_layers"] == verification["quantizable_layers"]


def test_linked_folders_are_refused(images, tmp_path):
    (tmp_path / "val").symlink_to(images / "val", target_is_directory=True)
    (tmp_path / "train").symlink_to(images / "val", target_is_directory=True)
    config = CONFIGS / "ptq_openvino_resnet18_8xb32_in1k_calib32xb32.py"
    options = ("--data.root", tmp_path, "--model.num-classes", "2", "--work-dir", tmp_path / "work")
    done = halfeven("ptq", config, *options)
    assert done.returncode == 2
    assert "8 of the 8 calibration samples are validation samples too" in " ".join(done.stderr.split())
    assert not (tmp_path / "work").exists()
