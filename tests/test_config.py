"""Configs are Python files that end with an experiment; mistakes in them are named."""

import dataclasses
import sys
from pathlib import Path

import pytest

from halfeven.config import Experiment, ExportOptions, load_experiment
from halfeven.errors import ConfigError
from halfeven.ptq.options import PTQOptions
from halfeven.training.options import TrainingOptions
from halfeven.zoo.models import ModelOptions
from halfeven.zoo.options import DataOptions

CONFIGS = Path(__file__).parents[1] / "configs"
HEAD = """
from halfeven.config import *
from halfeven.zoo.models import ModelOptions
from halfeven.zoo.options import DataOptions
"""


def write(folder, text, name="c.py"):
    path = folder / name
    path.write_text(HEAD + text)
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.py")), ids=lambda path: path.stem)
def test_every_config_loads_and_explains_itself(path):
    assert isinstance(load_experiment(path), Experiment)
    assert path.read_text().startswith('"""')


def test_the_seed_recipe():
    experiment = load_experiment(CONFIGS / "qat" / "qat_openvino_resnet18_10e_8xb32_in1k.py")
    training = experiment.training
    assert (training.optimizer, training.learning_rate, training.momentum, training.weight_decay) == (
        "sgd",
        1e-4,
        0.9,
        1e-4,
    )
    assert (training.schedule, training.warmup_steps, training.clip_norm, training.label_smoothing) == (
        "constant",
        0,
        0,
        0,
    )
    assert (training.epochs, training.batch_size, training.base_batch_size) == (10, 32, 256)
    assert training.decay_norms_and_biases
    assert (experiment.data.resize, experiment.data.image_size) == (256, 224)
    assert (experiment.schedule.freeze_batchnorm_after, experiment.schedule.stop_observing_after) == (1, 1)


def test_the_recipes_of_the_lsq_paper():
    ten = load_experiment(CONFIGS / "qat" / "lsq_openvino_resnet18_8xb32_10e_in1k.py")
    hundred = load_experiment(CONFIGS / "qat" / "lsq_openvino_resnet18_8xb32_100e_in1k.py")
    assert ten.quantization.ranges == hundred.quantization.ranges == "learned"
    assert ten.schedule.freeze_batchnorm_after == 0
    assert (ten.training.epochs, ten.training.schedule) == (10, "constant")
    assert (hundred.training.epochs, hundred.training.schedule, hundred.training.schedule_by) == (
        100,
        "cosine",
        "epoch",
    )


@pytest.mark.parametrize(
    ("name", "model"),
    [("resnet18", "resnet18.tv_in1k"), ("resnet50", "resnet50.tv_in1k"), ("mbv2", "mobilenetv2_100.ra_in1k")],
)
def test_the_recipes_of_post_training_quantization(name, model):
    experiment = load_experiment(CONFIGS / "ptq" / f"ptq_openvino_{name}_8xb32_in1k_calib32xb32.py")
    assert (experiment.model.name, experiment.model.weights) == (model, "pretrained")
    assert (experiment.data.calibration_samples, experiment.data.evaluation_batch_size) == (1024, 32)
    assert (experiment.data.resize, experiment.data.image_size) == (256, 224)
    assert (experiment.quantization.target, experiment.quantization.scheme) == ("openvino", "w8a8")
    assert experiment.ptq == PTQOptions(), "the steps are the pipeline's to choose"


def test_a_config_derives_from_another(tmp_path):
    write(
        tmp_path,
        'experiment = Experiment(model=ModelOptions(weights="w.pth"), data=DataOptions(), seed=3)',
        "first_of_two.py",
    )
    text = "import dataclasses\nfrom first_of_two import experiment as base\n"
    text += "experiment = dataclasses.replace(base, seed=base.seed + 1)"
    assert load_experiment(write(tmp_path, text)).seed == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must end with `experiment = Experiment"),
        ("experiment = {}", "there is a dict"),
        ("1 / 0", r"line 5\): ZeroDivisionError"),
        ("experiment = (", "SyntaxError"),
        ("experiment = TrainingOptions(epohcs=3)", "Did you mean epochs?"),
        ("experiment = TrainingOptions(zzz=3)", "There are epochs"),
        ("experiment = TrainingOptions(epochs=-3)", r"epochs=-3 must be an integer \(at least 0\)"),
        ("import no_such_module", "ModuleNotFoundError"),
    ],
)
def test_mistakes_in_a_config(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_experiment(write(tmp_path, text))


def test_a_missing_config_names_the_nearest(tmp_path):
    write(tmp_path, "", "digits.py")
    with pytest.raises(ConfigError, match=r"digit\.py does not exist.* Did you mean \S+/digits\.py\?"):
        load_experiment(tmp_path / "digit.py")


def test_only_a_python_file_is_a_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs" / "quickstart"
    folder.mkdir(parents=True)
    write(folder, "", "digits.py")
    (tmp_path / "digits.json").write_text("{}")
    meant = r"Did you mean configs/quickstart/digits\.py\?"
    with pytest.raises(ConfigError, match=rf"digits does not exist, .*{meant}"):
        load_experiment("digits")
    with pytest.raises(ConfigError, match=rf"digits\.json is no Python file, .*{meant}"):
        load_experiment("digits.json")
    with pytest.raises(ConfigError, match=rf"configs/quickstart is a folder, .*{meant}"):
        load_experiment("configs/quickstart")
    with pytest.raises(ConfigError, match="Give the path of such a file"):
        load_experiment("zzz.py")


def test_a_file_beside_a_config_hides_no_library(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "timeit", raising=False)
    for name in ("torch.py", "timeit.py"):
        (tmp_path / name).write_text("raise AssertionError('this is no library')")
    text = "import timeit, torch\nexperiment = Experiment(model=ModelOptions(), data=DataOptions(), seed=7)"
    assert load_experiment(write(tmp_path, text)).seed == 7


def test_fields_that_contradict_each_other():
    base = Experiment(model=ModelOptions(weights="w.pth"), data=DataOptions())
    with pytest.raises(ConfigError, match="not clear which weights to use"):
        dataclasses.replace(base, pretraining=TrainingOptions(epochs=1))
    with pytest.raises(ConfigError, match="leaves the quantized model untrained"):
        dataclasses.replace(base, training=TrainingOptions(epochs=0))
    with pytest.raises(ConfigError, match="onnxruntime reads no such files"):
        dataclasses.replace(base, export=ExportOptions(formats=("onnx", "xml"), target="onnxruntime"))
    assert base.endings("openvino") == (".xml",)
    assert base.endings("tensorrt") == (".onnx",)
