"""The command line finds mistakes before any work, says what is wrong, and exits with code 2."""

import dataclasses
import json

import pytest

from halfeven.cli import main as cli
from halfeven.config import Experiment, as_dict, load_experiment
from halfeven.ptq.options import PTQOptions
from halfeven.zoo.models import ModelOptions

DIGITS = """
from halfeven.config import *
from halfeven.zoo.models import ModelOptions
from halfeven.zoo.options import DataOptions

experiment = Experiment(
    model=ModelOptions(name="resnet18", num_classes=10, in_chans=1),
    data=DataOptions(source="digits", workers=0),
    pretraining=TrainingOptions(epochs=1),
    device=DeviceOptions(kind="cpu"),
)
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "digits.py").write_text(DIGITS)
    return str(tmp_path / "digits.py")


@pytest.fixture
def refused(capsys):
    """Runs the command line, which must exit with code 2 without a traceback; gives what it said as one line."""

    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        assert caught.value.code == 2
        said = capsys.readouterr()
        text = " ".join((said.out + said.err).replace("│", " ").split())
        assert "Traceback" not in text
        return text

    return run


SAME_IMAGES = """
from halfeven.zoo import datasets

def images(options):
    data = datasets.digits(options)
    return datasets.Datasets(train=data.train, calibration=data.validation, validation=data.validation, num_classes=10)
"""


@pytest.mark.parametrize("command", ["train", "ptq"])
def test_calibration_on_the_validation_images_is_refused(refused, config, tmp_path, monkeypatch, command):
    (tmp_path / "same_images.py").write_text(SAME_IMAGES)
    monkeypatch.syspath_prepend(tmp_path)
    data = ["--data.source", "callable", "--data.function", "same_images:images"]
    said = refused(command, config, *data, "--work-dir", tmp_path / "w")
    assert "360 of the 360 calibration images are validation images too" in said
    assert not (tmp_path / "w").exists(), "nothing is written before the mistake is found"


def test_ptq_runs_in_one_process(refused, config, tmp_path, monkeypatch):
    monkeypatch.setattr("halfeven.cli.ptq.world_size", lambda: 2)
    assert "started with 2 processes" in refused("ptq", config, "--work-dir", tmp_path / "w")


def test_a_run_is_resumed_by_its_own_command(refused, config, tmp_path):
    record = {"command": "train", **as_dict(load_experiment(config))}
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    said = refused("ptq", config, "--resume", "--work-dir", tmp_path)
    assert 'command was "train" and is "ptq"' in said


def test_steps_of_ptq_are_switched_on_the_command_line(config):
    parsed = cli.parse("ptq", [config, "--ptq.reconstruct", "blocks", "--ptq.equalize", "off", "--resume"])
    assert parsed.experiment.ptq == PTQOptions(reconstruct="blocks", equalize="off")
    assert parsed.resume


def test_unknown_command(refused):
    assert 'no command "tran". Did you mean train?' in refused("tran")


@pytest.mark.parametrize("command", ["train", "ptq", "test", "export"])
def test_a_config_is_required(refused, command):
    assert "CONFIG" in refused(command)


def test_a_checkpoint_is_required(refused, config):
    assert "CKPT" in refused("test", config)


def test_an_unknown_option_names_the_nearest(refused, config):
    said = refused("train", config, "--training.epohcs", "1")
    assert "Unrecognized options: --training.epohcs" in said
    assert "--training.epochs" in said


def test_a_value_of_the_wrong_type(refused, config):
    assert "invalid literal for int() with base 10: 'many'" in refused("train", config, "--training.epochs", "many")


def test_a_value_that_is_no_choice(refused, config):
    assert "sgd" in refused("train", config, "--training.optimizer", "adagrad")


def test_a_value_out_of_bounds(refused, config):
    assert "epochs=-3 (at least 0)" in refused("train", config, "--training.epochs", "-3")


def test_a_scheme_that_cannot_be(refused, config, tmp_path):
    said = refused("train", config, "--quantization.scheme", "w1a8", "--work-dir", tmp_path / "w")
    assert "bits=1" in said


def test_an_equalization_that_batchnorm_would_undo(refused, config, tmp_path):
    said = refused("train", config, "--qat.equalize", "on", "--work-dir", tmp_path / "w")
    assert 'Set quantization.batchnorm="fold"' in said
    assert not (tmp_path / "w").exists()


def test_classes_that_do_not_fit(refused, config, tmp_path):
    said = refused("train", config, "--model.num-classes", "7", "--model.in-chans", "3", "--work-dir", tmp_path / "w")
    assert "model.num_classes=7, and the data has 10; model.in_chans=3, and the images have 1" in said
    assert not (tmp_path / "w").exists(), "nothing is written before the mistakes are found"


@pytest.mark.parametrize("command", ["train", "ptq"])
def test_random_weights_are_not_quantized(refused, config, command):
    assert "random numbers would be quantized" in refused(command, config, "--pretraining.epochs", "0")


def test_missing_weights(refused, config, tmp_path):
    options = ["--pretraining.epochs", "0", "--model.weights", tmp_path / "w.pth", "--work-dir", tmp_path / "w"]
    assert "no weights file" in refused("train", config, *options)


@pytest.mark.parametrize("command", ["train", "ptq"])
def test_nothing_to_resume(refused, config, tmp_path, command):
    assert "nothing can be resumed" in refused(command, config, "--resume", "--work-dir", tmp_path / "w")


@pytest.mark.parametrize("command", ["train", "ptq"])
def test_a_run_is_not_overwritten(refused, config, tmp_path, command):
    (tmp_path / "experiment.json").write_text("{}")
    assert "holds a run already" in refused(command, config, "--work-dir", tmp_path)


def test_missing_checkpoint(refused, config, tmp_path):
    for command in ("test", "export"):
        assert "There is no checkpoint" in refused(command, config, tmp_path / "best.safetensors")


def test_a_training_state_is_no_checkpoint(refused, config, tmp_path):
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 something")
    assert "not a whole safetensors file" in refused("test", config, tmp_path / "state.pt")


@pytest.mark.parametrize("command", ["train", "ptq", "test", "export"])
def test_help_lists_every_field(command, config, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, config, "--help"])
    assert caught.value.code == 0
    said = capsys.readouterr().out
    for option in dataclasses.fields(Experiment):
        if dataclasses.is_dataclass(option.type):
            for name in (f.name for f in dataclasses.fields(option.type)):
                # Rules are values with fields of their own, written in the config.
                if name != "rules":
                    assert f"--{option.name}.{name.replace('_', '-')}" in said
    assert "--seed" in said


def test_overview(capsys):
    cli.main([])
    assert "halfeven train CONFIG" in capsys.readouterr().out


def test_fields_are_overridden(config):
    parsed = cli.parse(
        "train", [config, "--training.epochs", "7", "--model.arguments", "zero_init_last", "False", "--amp"]
    )
    assert parsed.experiment.training.epochs == 7
    assert parsed.experiment.model == ModelOptions(
        name="resnet18", num_classes=10, in_chans=1, arguments={"zero_init_last": False}
    )
    assert parsed.experiment.data.source == "digits"
    assert parsed.amp
    assert not parsed.resume


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys, config):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", config])
    assert caught.value.code == 130
    assert "--resume" in capsys.readouterr().err
