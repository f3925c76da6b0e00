"""The command line finds mistakes before any work, says what is wrong, and exits with code 2."""

import contextlib
import dataclasses
import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from torch import nn
from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo

import halfeven
from halfeven.cli import main as cli
from halfeven.cli.help import FIRST_OPTIONS, POSITIONALS
from halfeven.cli.run_record import check_same_run
from halfeven.cli.values import unchecked
from halfeven.cli.verify import problems_of
from halfeven.cli.work_folder import _begin_record
from halfeven.config import as_dict, load_experiment
from halfeven.errors import ConfigError
from halfeven.ptq.options import PTQOptions
from halfeven.training.stopping import StopRequested
from halfeven.zoo.models import ModelOptions
from processes import run

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


WITH_CONFIG = ["train", "ptq", "test", "export", "verify", "diagnose"]
CONFIGS_FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted(CONFIGS_FOLDER.rglob("*.py"))


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a layer."""
    model = halfeven.prepare(nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4))
    halfeven.save(halfeven.calibrate(model, [torch.randn(2, 4)]), tmp_path / "layer.safetensors")
    return tmp_path / "layer.safetensors"


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


KEYLESS = """
from halfeven.tasks import Classification

class Keyless(Classification):
    key = "top2"

def task(classes):
    return Keyless(classes)
"""

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
    assert "360 of the 360 calibration samples are validation samples too" in said
    assert not (tmp_path / "w").exists(), "nothing is written before the mistake is found"


@pytest.mark.parametrize("command", ["ptq", "search", "diagnose"])
def test_what_processes_would_do_alike_runs_in_one(refused, config, tmp_path, monkeypatch, command):
    monkeypatch.setattr("halfeven.cli.quantization_run.world_size", lambda: 2)
    options = {"ptq": ("--work-dir", tmp_path / "w"), "search": ("--search.max-drop", 1), "diagnose": ()}
    assert "started with 2 processes" in refused(command, config, *options[command])


def test_a_run_is_resumed_by_its_own_command(refused, config, tmp_path):
    record = {"command": "train", **as_dict(load_experiment(config))}
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    said = refused("ptq", config, "--resume", "--work-dir", tmp_path)
    assert 'command was "train" and is "ptq"' in said


def test_a_run_recorded_with_old_names_and_spellings_is_the_same_run(refused, config, tmp_path):
    record = as_dict(load_experiment(config))
    record["data"]["calibration_images"] = record["data"].pop("calibration_samples")
    record["data"]["root"] = ""
    record["training"]["max_steps"] = 0
    record["schedule"]["re_estimate"] = None
    del record["model"]["weights_entry"]  # an option that came later
    (tmp_path / "experiment.json").write_text(json.dumps(record))
    arguments = ("train", config, "--work-dir", tmp_path, "--resume", "--seed", "1")
    assert "with other options: seed was 0 and is 1. Resumed" in refused(*arguments)
    said = refused(*arguments, "--data.calibration-samples", "8")
    assert "other options: data.calibration_samples was 512 and is 8; seed was" in said


@pytest.mark.parametrize("old", ["--data.calibration-images", "--data.calibration_images"])
@pytest.mark.parametrize("joined", [True, False])
def test_an_old_name_on_the_command_line(config, old, joined):
    words = [f"{old}=8"] if joined else [old, "8"]
    with pytest.warns(DeprecationWarning, match=f"{old} is now --data.calibration-samples; the next version"):
        parsed = cli.parse("train", [config, *words])
    assert parsed.experiment.data.calibration_samples == 8


@pytest.mark.parametrize(
    ("option", "read"),
    [
        ("--training.nesterov", lambda e: e.training.nesterov),
        ("--schedule.re-estimate", lambda e: e.schedule.re_estimate),
        ("--export.timed", lambda e: e.export.timed),
        ("--quantization.rules.0.per-channel", lambda e: e.quantization.rules[0].per_channel),
    ],
)
def test_booleans_may_be_spelt_as_elsewhere(config, option, read):
    path = Path(config)
    rule = "    quantization=QuantizationOptions(rules=(Rule(pattern='fc', weight_bits=8),)),\n    device"
    path.write_text(path.read_text().replace("    device", rule))
    for value, words in (
        (True, ("true", "TRUE", "True", "yes", "on", "1")),
        (False, ("false", "no", "No", "OFF", "0")),
    ):
        for word in words:
            assert read(cli.parse("train", [config, option, word]).experiment) is value, word
    assert read(cli.parse("train", [config, f"{option}=yes"]).experiment) is True


def test_words_that_are_no_booleans(refused, config):
    assert "training.nesterov='maybe'" in refused("train", config, "--training.nesterov", "maybe").replace('"', "'")
    given = cli.parse("train", [config, "--model.arguments", "pretrained", "false", "name", "no", "depth", "1"])
    assert given.experiment.model.arguments == {"pretrained": False, "name": "no", "depth": 1}


@pytest.mark.parametrize(
    ("words", "resume", "overwrite"),
    [
        (["--resume", "true"], True, False),
        (["--resume=yes", "--overwrite", "False"], True, False),
        (["--resume=0", "--overwrite"], False, True),
        (["--resume", "on", "--overwrite=off"], True, False),
        (["--auto_resume", "no", "--overwrite", "YES"], False, True),
    ],
)
def test_switches_may_have_values(config, words, resume, overwrite):
    parsed = cli.parse("train", [*words, config])
    assert (parsed.resume, parsed.overwrite, parsed.auto_resume) == (resume, overwrite, False)


def test_an_error_of_the_parser_leaves_the_rules_as_they_were(monkeypatch):
    registry = unchecked()
    kept = ConstructorRegistry.get_primitive_spec
    monkeypatch.setattr(ConstructorRegistry, "get_primitive_spec", classmethod(lambda *a: {}["broken"]))
    info = PrimitiveTypeInfo.make(bool, set())
    rule = registry._primitive_rules[-1]
    with pytest.raises(KeyError):
        rule(info)
    monkeypatch.setattr(ConstructorRegistry, "get_primitive_spec", kept)
    assert rule(info) is not None


def test_what_changes_no_result_may_differ_when_a_run_is_resumed(config, tmp_path):
    experiment = load_experiment(config)
    recorded = {"command": "train", **as_dict(experiment)}
    for part in ("pretraining", "training"):
        changed = dataclasses.replace(getattr(experiment, part), log_every=3, save_every=7)
        experiment = dataclasses.replace(experiment, **{part: changed})
    check_same_run(recorded, {"command": "train", **as_dict(experiment)}, tmp_path)
    other = dataclasses.replace(experiment, pretraining=dataclasses.replace(experiment.pretraining, batch_size=7))
    with pytest.raises(ConfigError, match=r"options: pretraining\.batch_size was 32 and is 7\. Resumed"):
        check_same_run(recorded, {"command": "train", **as_dict(other)}, tmp_path)


def test_an_old_and_a_new_name_on_the_command_line_are_refused(refused, config):
    said = refused("train", config, "--export.verify-images=8", "--export.verify-samples", "8")
    assert "--export.verify-images is the old name of --export.verify-samples, and both are given" in said


def test_a_config_with_an_old_name_is_read_and_the_warning_shown(tmp_path):
    """In a process of its own, since pytest shows warnings that Python hides."""
    path = tmp_path / "old.py"
    path.write_text(DIGITS.replace("workers=0", "workers=0, calibration_images=0"))
    command = [sys.executable, "-m", "halfeven.cli.main", "train", str(path), "--work-dir", str(tmp_path / "w")]
    done = run(command)
    assert done.returncode == 2
    assert f"{path}:8: DeprecationWarning: DataOptions.calibration_images is now calibration_samples" in done.stderr
    assert "DataOptions.calibration_samples=0 must be an integer (at least 1)" in done.stderr


def test_steps_of_ptq_are_switched_on_the_command_line(config):
    parsed = cli.parse("ptq", [config, "--ptq.reconstruct", "blocks", "--ptq.equalize", "off", "--resume"])
    assert parsed.experiment.ptq == PTQOptions(reconstruct="blocks", equalize="off")
    assert parsed.resume


@pytest.mark.parametrize("config", ["digits", "configs", "pyproject.toml", "digits.py"])
@pytest.mark.parametrize("command", ["train", "ptq", "test", "export", "verify"])
def test_what_is_no_config_is_refused_by_name(refused, command, config):
    assert f"{config} " in refused(command, config, "--seed", "1")


def test_an_unknown_command_is_answered_with_the_nearest_one(refused):
    assert 'no command "tran". Did you mean train?' in refused("tran")
    assert "There are train, ptq, search, test, export, verify, diagnose, init." in refused("quux")


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_a_config_is_required(refused, command):
    assert "No CONFIG was given" in refused(command)
    assert "No CONFIG was given" in refused(command, "--seed", "1")


@pytest.mark.parametrize("command", WITH_CONFIG)
def test_a_config_that_is_no_python_file_is_refused_by_name(refused, command):
    assert "digits" in refused(command, "digits")


def test_a_checkpoint_and_a_file_are_required(refused, config):
    assert "CKPT" in refused("test", config)
    assert "FILE" in refused("verify", config, "best.safetensors")


def test_a_config_behind_the_checkpoint(refused, config):
    said = refused("test", "best.safetensors", config)
    assert "best.safetensors stands where the config belongs" in said
    assert f"Write `halfeven test {config}" in said


def test_an_unknown_option_names_the_nearest(refused, config):
    said = refused("train", config, "--training.epohcs", "1")
    assert "nothing was started: there is no --training.epohcs. Did you mean --training.epochs?" in said


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--training.lr", "--training.learning-rate?"),
        ("--lr=0.1", "--training.learning-rate or --pretraining.learning-rate?"),
        ("--batch_size", "--training.batch-size, --ptq.batch-size or --pretraining.batch-size?"),
        ("--mode.name", "--model.name?"),
        ("--target", "--quantization.target or --export.target?"),
        ("--bits", "--quantization.scheme, "),
        ("--gpu", "--device.kind?"),
        ("--output-dir", "--work-dir?"),
        ("--resum", "--resume?"),
    ],
)
def test_an_option_by_the_name_that_other_tools_give_it(refused, config, given, meant):
    assert f"there is no {given.partition('=')[0]}. Did you mean {meant}" in refused("train", config, given, "1")


def test_an_unknown_option_without_a_near_one(refused, config):
    said = refused("train", config, "--xyzzy", "1", "--quantization.plugh")
    assert "2 options cannot be used" in said
    assert "there is no --xyzzy. `halfeven train CONFIG --help` lists all options." in said


def test_an_unknown_option_of_a_command_without_a_config(refused):
    assert "there is no --overwite. Did you mean --overwrite?" in refused("init", "--overwite")
    assert "`halfeven init --help`" in refused("init", "--xyzzy")


@pytest.mark.parametrize("option", ["--quantization.rules", "--quantization.dynamic_shapes=x"])
def test_what_a_config_alone_can_set(refused, config, option):
    said = refused("ptq", config, option, "fc")
    name = option.removeprefix("--").removesuffix("=x")
    assert f"{name} has values of several parts, which stand in the config alone" in said


def test_a_value_of_the_wrong_type(refused, config):
    assert 'training.epochs="many" must be an integer' in refused("train", config, "--training.epochs", "many")


def test_a_value_that_is_no_choice(refused, config):
    assert "sgd" in refused("train", config, "--training.optimizer", "adagrad")


def test_a_value_out_of_bounds(refused, config):
    assert "epochs=-3 must be an integer (at least 0)" in refused("train", config, "--training.epochs", "-3")


def test_a_scheme_that_cannot_be(refused, config, tmp_path):
    said = refused("train", config, "--quantization.scheme", "w1a8", "--work-dir", tmp_path / "w")
    assert "asks for 1 bits" in said


def test_an_equalization_that_batchnorm_would_undo(refused, config, tmp_path):
    said = refused("train", config, "--qat.equalize", "on", "--work-dir", tmp_path / "w")
    assert 'Set quantization.batchnorm="fold"' in said
    assert not (tmp_path / "w").exists()


def test_an_optimizer_for_scales_that_are_not_learned(refused, config, tmp_path):
    options = ["--model.name", "test_resnet", "--training.scale-optimizer", "adam", "--work-dir", tmp_path / "w"]
    assert "this model has none" in refused("train", config, *options)
    assert not (tmp_path / "w").exists()


def test_a_task_whose_key_is_no_metric(refused, config, tmp_path):
    (tmp_path / "keyless.py").write_text(KEYLESS)
    options = ["--model.name", "test_resnet", "--task.kind", "callable", "--task.function", "keyless:task"]
    said = refused("train", config, *options, "--work-dir", tmp_path / "w")
    assert "The key of the task, 'top2', is none of its metrics (top1, top5)" in said
    assert not (tmp_path / "w").exists()


def test_classes_that_do_not_fit(refused, config, tmp_path):
    said = refused("train", config, "--model.num-classes", "7", "--model.in-chans", "3", "--work-dir", tmp_path / "w")
    assert "model.num_classes=7, and the data has 10; model.in_chans=3, and the images have 1" in said
    assert not (tmp_path / "w").exists(), "nothing is written before the mistakes are found"


@pytest.mark.parametrize("command", ["train", "ptq"])
def test_random_weights_are_not_quantized(refused, config, command):
    assert "random numbers would be quantized" in refused(command, config, "--pretraining.epochs", "0")


def test_missing_weights_are_refused(refused, config, tmp_path):
    options = ["--pretraining.epochs", "0", "--model.weights", tmp_path / "w.pth", "--work-dir", tmp_path / "w"]
    assert "no weights file" in refused("train", config, *options)


@pytest.mark.parametrize("command", ["train", "ptq"])
def test_nothing_to_resume(refused, config, tmp_path, command):
    assert "nothing can be resumed" in refused(command, config, "--resume", "--work-dir", tmp_path / "w")


@pytest.mark.parametrize("command", ["train", "ptq"])
def test_a_run_is_not_overwritten(refused, config, tmp_path, command):
    (tmp_path / "experiment.json").write_text("{}")
    (tmp_path / "best.safetensors").touch()
    assert "holds a run already" in refused(command, config, "--work-dir", tmp_path)


@pytest.mark.parametrize("command", ["train", "ptq"])
def test_checkpoints_of_no_run_are_not_deleted(refused, config, tmp_path, command):
    """As of a script of the user's, whose float weights the run may start from."""
    (tmp_path / "best.safetensors").write_text("mine")
    assert "best.safetensors, and no run that they belong to" in refused(command, config, "--work-dir", tmp_path)
    assert (tmp_path / "best.safetensors").read_text() == "mine"


@pytest.mark.parametrize("command", ["train", "ptq"])
def test_a_run_does_not_delete_the_weights_that_it_starts_from(refused, config, tmp_path, command):
    weights = tmp_path / "float" / "best.safetensors"
    weights.parent.mkdir()
    weights.touch()
    (tmp_path / "experiment.json").write_text("{}")
    given = ("--model.weights", weights, "--pretraining.epochs", "0", "--work-dir", tmp_path, "--overwrite")
    assert "would delete the float weights that it starts from" in refused(command, config, *given)
    assert weights.exists()


def test_a_new_run_removes_the_files_of_the_old_one_and_no_others(config, tmp_path):
    """A model.onnx of the old run would pass for one of the new run, which writes a model.xml."""
    context = SimpleNamespace(folder=tmp_path, experiment=load_experiment(config))
    (tmp_path / "model.onnx").touch()
    _begin_record(context, "ptq", resume=False)
    assert (tmp_path / "model.onnx").exists(), "the folder had no run before"
    (tmp_path / "results.json").touch()
    _begin_record(context, "ptq", resume=True)
    assert (tmp_path / "results.json").exists()
    _begin_record(context, "ptq", resume=False)
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".py", "")] == ["experiment.json"]


def test_a_missing_checkpoint_is_refused_by_each_command(refused, config, tmp_path):
    for command, *file in (("test",), ("export",), ("verify", "model.xml")):
        assert "There is no checkpoint" in refused(command, config, tmp_path / "best.safetensors", *file)


def test_a_training_state_is_no_checkpoint(refused, config, tmp_path):
    (tmp_path / "state.pt").write_bytes(b"PK\x03\x04 something")
    said = refused("test", config, tmp_path / "state.pt")
    assert "not a whole safetensors file: torch.save wrote it" in said
    assert "Float weights belong to model.weights" in said


def test_a_misspelt_path_of_a_checkpoint_or_file(refused, config, checkpoint, tmp_path):
    assert f"Did you mean {checkpoint}?" in refused("export", config, tmp_path / "layer.safetensor")
    (tmp_path / "model.xml").touch()
    assert f"Did you mean {tmp_path / 'model.xml'}?" in refused("verify", config, checkpoint, tmp_path / "modle.xml")
    said = refused("ptq", config, "--pretraining.epochs", 0, "--model.weights", tmp_path / "layr.safetensors")
    assert f"Did you mean {checkpoint}?" in said


def test_a_misspelt_folder_of_images(refused, config, tmp_path):
    (tmp_path / "photos" / "train").mkdir(parents=True)
    said = refused("ptq", config, "--data.source", "image_folder", "--data.root", tmp_path / "phots")
    assert f"There is no folder {tmp_path / 'phots' / 'train'}" in said
    assert f"Did you mean {tmp_path / 'photos' / 'train'}?" in said
    assert "data.root is not set" in refused("ptq", config, "--data.source", "image_folder")


def test_a_class_without_images(refused, config, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
    said = refused("ptq", config, "--data.source", "image_folder", "--data.root", tmp_path)
    assert f"The images in {tmp_path / 'train'} cannot be used: Found no valid file for the classes cat." in said
    assert ".webp. Put a folder with at least one image there for each class, and remove empty folders." in said


def lines_of_help(capsys, *arguments):
    """What `--help` prints, line by line, at the width of the terminal."""
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("command", WITH_CONFIG)
@pytest.mark.parametrize("columns", [80, 100])
def test_help_lists_what_can_be_set(command, columns, config, capsys, monkeypatch):
    """Every option that is read, once; those that matter first before the parts; no line wider than the terminal."""
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = lines_of_help(capsys, command, config)
    assert all(len(line) <= columns for line in lines)
    assert not [line for line in lines if line.count("{") != line.count("}") or "}|{" in line]
    listed = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(listed) == len(set(listed))
    kind = cli.imported(next(one.arguments for one in cli.COMMANDS if one.name == command))
    first = [f"--{name.replace('_', '-')}" for name in FIRST_OPTIONS[command]]
    own = [f for f in dataclasses.fields(kind) if f.name not in {*POSITIONALS, "experiment"}]
    assert listed[len(own) : len(own) + len(first)] == first
    fields = {name for name in listed if "." in name}
    in_configs_alone = {"--quantization.dynamic-shapes"}  # a dict of dicts; tyro alone would list it
    assert fields == {name for name in read_by_tyro(kind, load_experiment(config)) - in_configs_alone if "." in name}


def read_by_tyro(kind, experiment):
    """The options in tyro's own help, which lists in another order what it reads; wide enough for none to break."""
    required = {name: tyro.MISSING for name in POSITIONALS if name in {f.name for f in dataclasses.fields(kind)}}
    out = io.StringIO()
    default = kind(experiment=experiment, **required)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        patch.setenv("COLUMNS", "1000")
        tyro.cli(kind, args=["--help"], default=default, config=(tyro.conf.AvoidSubcommands,))
    return set(re.findall(r"--[a-z][\w.-]+", out.getvalue()))


def test_the_help_of_train_begins_with_twenty_options():
    assert len(FIRST_OPTIONS["train"]) == len(set(FIRST_OPTIONS["train"])) == 20


def test_help_shows_the_configs_values(config, capsys):
    said = " ".join(" ".join(lines_of_help(capsys, "train", config)).split())
    assert "(in brackets: the config's values)" in said
    assert "Channels of the input image (timm; torchvision's models take 3). [1]" in said
    said = " ".join(" ".join(lines_of_help(capsys, "train")).split())
    assert "(in brackets: the defaults)" in said
    assert "Channels of the input image (timm; torchvision's models take 3). [3]" in said


def test_the_help_of_a_command_without_a_config(capsys):
    lines = lines_of_help(capsys, "init")
    assert lines[0] == "usage: halfeven init [FOLDER] [OPTIONS]"
    assert [line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "] == [
        "FOLDER",
        "--overwrite",
        "--json",
        "-h,",
    ]


def test_the_overview_lists_each_command(capsys):
    cli.main([])
    said = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"\n  {command.name} {command.takes} " in said
        assert callable(cli.imported(command.run))
    cli.main(["--help"])
    assert capsys.readouterr().out == said


def test_version_and_overview_need_neither_torch_nor_the_commands():
    """Both answer at once: what takes seconds to import is not imported."""
    program = """
import sys
from halfeven.cli.main import main
main(["--version"])
main(["--help"])
assert not {"torch", "numpy", "tyro", "rich", "halfeven.config"} & set(sys.modules)
"""
    done = run([sys.executable, "-c", program], check=True)
    assert done.stdout.startswith(f"halfeven {halfeven.__version__}\n")


def test_init_writes_the_configs_and_overwrites_none(refused, tmp_path, capsys):
    cli.main(["init", str(tmp_path)])
    assert f"Wrote {len(CONFIGS)} configs" in capsys.readouterr().out
    for path in CONFIGS:
        assert (tmp_path / path.relative_to(CONFIGS_FOLDER.parent)).read_bytes() == path.read_bytes()
    quickstart = tmp_path / "configs" / "quickstart" / "digits.py"
    quickstart.write_text("mine")
    (tmp_path / "configs" / "qat" / "bert_base_sst2.py").unlink()
    said = refused("init", tmp_path)
    assert f"{quickstart} is there already and would be lost" in said
    assert quickstart.read_text() == "mine"
    assert not (tmp_path / "configs" / "qat" / "bert_base_sst2.py").exists(), "nothing is written, rather than a part"
    cli.main(["init", str(tmp_path), "--overwrite"])
    assert f"Wrote 2 of {len(CONFIGS)} configs" in capsys.readouterr().out
    assert load_experiment(quickstart).model.name == "test_resnet"


def report(**changes):
    """A report without a fault, but for the changes."""
    good = {"weights_match": True, "alone_match": 1.0, "float_layers": [], "quantizable_layers": 3, "overflows": False}
    good |= {"findings": [], "float_precision": "f32", "float32_session": None, "float_reason": ""}
    return SimpleNamespace(**{**good, "first_difference": "conv1", **changes})


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"alone_match": float("nan")}, ""),  # weights alone are quantized: no integers to compare
        ({"alone_match": 0.99995}, ""),
        ({"alone_match": 0.9998}, "99.9800 % of the integers"),
        ({"alone_match": 0.9998, "overflows": True}, "This processor has no VNNI"),
        ({"findings": ['The output "boxes" differs']}, 'The output "boxes" differs'),
        ({"weights_match": False}, "integer weights in the file are not the checkpoint's"),
        ({"float_layers": ["fc (f32 gemm)"]}, "1 of 3 layers with quantized weights ran in float: fc (f32 gemm)"),
        (
            {"float_layers": ["fc"], "alone_match": float("nan")},
            "1 of 3 layers with quantized weights read them as floats",
        ),
    ],
)
def test_verify_says_what_is_wrong_with_a_file(changes, problem):
    found = problems_of(report(**changes), 0.9999, allow_float=False)
    assert len(found) == bool(problem)
    assert not problem or problem in found[0]


def test_layers_in_float_can_be_allowed():
    assert not problems_of(report(float_layers=["fc"]), 0.9999, allow_float=True)


def test_a_share_beyond_one_is_refused(refused, config, checkpoint):
    said = refused("verify", config, checkpoint, checkpoint, "--min-match", "99.9")
    assert "--min-match 99.9 is not between 0 and 1" in said


def test_checkpoint_and_file_in_the_wrong_order(refused, config, checkpoint):
    said = refused("verify", config, "model.onnx", checkpoint)
    assert f"Write `halfeven verify {config} {checkpoint} model.onnx`" in said


@pytest.mark.parametrize("command", ["train", "export", "verify"])
def test_results_that_could_not_be_written_are_refused_before_the_work(refused, config, checkpoint, tmp_path, command):
    (tmp_path / "file").write_text("")
    given = {"train": [], "export": [checkpoint], "verify": [checkpoint, "model.xml"]}[command]
    for place in (tmp_path, tmp_path / "file" / "results.json"):
        assert f"--json {place} is no file that could be written" in refused(command, config, *given, "--json", place)


def test_a_file_to_verify_that_is_not_there(refused, config, checkpoint, tmp_path):
    assert "nothing can be verified" in refused("verify", config, checkpoint, tmp_path / "model.xml")


def test_fields_are_overridden(config):
    named = ["--model.arguments", "zero_init_last", "False"]
    parsed = cli.parse("train", [config, "--training.epochs", "7", *named, "--quantization.ranges", "pact", "--amp"])
    assert parsed.experiment.training.epochs == 7
    assert parsed.experiment.quantization.ranges == "clipped"
    assert parsed.experiment.model == ModelOptions(
        name="resnet18", num_classes=10, in_chans=1, arguments={"zero_init_last": False}
    )
    assert parsed.experiment.data.source == "digits"
    assert parsed.amp
    assert not parsed.resume


@pytest.mark.parametrize("command", [command.name for command in cli.COMMANDS])
def test_an_interruption_says_how_to_go_on(monkeypatch, capsys, config, command):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupt)
    with pytest.raises(SystemExit) as caught:
        cli.main([command, config])
    assert caught.value.code == 130
    kind = next(one.arguments for one in cli.COMMANDS if one.name == command)
    resumes = "resume" in {field.name for field in dataclasses.fields(cli.imported(kind))}
    assert ("--resume" in capsys.readouterr().err) == resumes


def test_a_command_without_resume_does_not_advise_it_when_it_is_stopped(monkeypatch, capsys):
    def stop(arguments):
        raise StopRequested("SIGTERM")

    monkeypatch.setattr("halfeven.cli.init.run_init", stop)
    assert cli.run(["init"]) == 75
    assert capsys.readouterr().err == "Stopped by SIGTERM.\n"


def test_free_axes_stay_as_the_config_has_them(config):
    """A dict of dicts has no option."""
    path = Path(config)
    free = {"images": {2: "height", 3: "width"}}
    with_axes = DIGITS.replace("experiment = Experiment(", "experiment = Experiment(quantization=AXES,")
    path.write_text(f"from halfeven.config import *\nAXES = QuantizationOptions(dynamic_shapes={free})\n{with_axes}")
    parsed = cli.parse("train", [config, "--training.epochs", "2"])
    assert parsed.experiment.quantization.dynamic_shapes == free
    assert parsed.experiment.training.epochs == 2


def test_every_command_writes_json():
    for command in cli.COMMANDS:
        names = {field.name for field in dataclasses.fields(cli.imported(command.arguments))}
        assert "json" in names, command.name


def test_init_tells_in_json_what_it_wrote(tmp_path):
    cli.main(["init", str(tmp_path), "--json", str(tmp_path / "a.json")])
    first = json.loads((tmp_path / "a.json").read_text())
    assert not first["kept"]
    assert all(Path(path).is_file() for path in first["written"])
    cli.main(["init", str(tmp_path), "--json", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text()) == {"written": [], "kept": first["written"]}
