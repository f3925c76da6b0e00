"""Misspelt and wrong values are refused alike in Python, in a config file and on the command line, before any work."""

import dataclasses
import math
from typing import get_type_hints

import pytest

from halfeven import config
from halfeven.cli import main as cli
from halfeven.config import Experiment
from halfeven.errors import ConfigError

CASES = [
    ("model.source", "tim", '"timm"'),
    ("model.num_classes", 0, "1"),
    ("model.in_chans", -3, "1"),
    ("data.source", "digit", '"digits"'),
    ("data.image_size", 0, "1"),
    ("data.resize", 256.5, "256"),
    ("data.keep_aspect", "never", "False"),
    ("data.std", (0.0, 1.0, 1.0), "above 0"),
    ("data.calibration_samples", -1, "1"),
    ("data.calibration_seed", -1, "0"),
    ("data.workers", -1, "0"),
    ("data.evaluation_batch_size", 1.5, "1"),
    ("data.text.max_length", 0, "1"),
    ("task.kind", "clasification", '"classification"'),
    ("task.auxiliary_weight", float("inf"), "finite"),
    ("quantization.scheme", 8, "w8a8"),
    ("quantization.ranges", "learnt", '"learned"'),
    ("quantization.scale_domain", "logs", '"log"'),
    ("quantization.learn_zero_points", "always", "True"),
    ("quantization.weight_observer", "min_max", '"minmax"'),
    ("quantization.activation_observer", "MSE", '"mse"'),
    ("quantization.batchnorm", "fold_live", '"fold live"'),
    ("quantization.first_and_last_bits", 1, "2"),
    ("ptq.equalize", "False", '"off"'),
    ("ptq.relu6", "replaced", '"replace"'),
    ("ptq.reconstruct", "layer", '"layers"'),
    ("ptq.iterations", "auo", '"auto"'),
    ("ptq.drop", -0.5, "0"),
    ("ptq.memory", 0.0, "above 0"),
    ("training.epochs", 2.5, "2"),
    ("training.max_steps", "all", "auto"),
    ("training.optimizer", "SGD", '"sgd"'),
    ("training.learning_rate", float("nan"), "finite"),
    ("training.schedule", "cosin", '"cosine"'),
    ("training.schedule_by", "steps", '"step"'),
    ("training.label_smoothing", 1.0, "below 1"),
    ("training.batch_size", "many", "32"),
    ("qat.distill", "false", '"off"'),
    ("qat.start", "block", '"blocks"'),
    ("qat.distillation.weight", 1.5, "1"),
    ("qat.distillation.temperature", 0.0, "above 0"),
    ("qat.averaging.decay", 1.0, "below 1"),
    ("qat.oscillation.freeze", "of", "False"),
    ("qat.oscillation.bits", 1, "2"),
    ("qat.progression.share", 0.0, "above 0"),
    ("schedule.freeze_batchnorm_after", 66.0, "1"),
    ("schedule.re_estimate", "of", "auto"),
    ("pretraining.optimizer", "adamv", '"adamw"'),
    ("search.max_drop", -0.5, "0"),
    ("search.samples", 0, "1"),
    ("export.formats", "xlm", '"xml"'),
    ("export.verify_samples", 0, "1"),
    ("device.kind", "gpu", '"cuda"'),
    ("device.precision", "bf16", '"bfloat16"'),
    ("device.threads", -2, "1"),
    ("seed", -1, "0"),
]
"""(dotted field, wrong value, words of the answer: the nearest right value, or the bound that it breaks)"""

HEAD = """
from halfeven.config import *

experiment = Experiment(
    model=ModelOptions(num_classes=10, in_chans=1),
    data=DataOptions(source="digits"),
    pretraining=TrainingOptions(epochs=1),
)
"""
every_case = pytest.mark.parametrize(("path", "value", "answer"), CASES, ids=[path for path, _, _ in CASES])


@pytest.fixture(scope="module")
def right_config(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "right.py"
    path.write_text(HEAD)
    return str(path)


def class_of(path):
    """The option class that has the field, and the field's name."""
    kind = Experiment
    *parts, name = path.split(".")
    for part in parts:
        kind = get_type_hints(kind)[part]
    return kind, name


def spelt(value):
    """A value as it is written in a config."""
    return repr(value) if not isinstance(value, float) or math.isfinite(value) else f'float("{value}")'


def words(value):
    """A value as it is written on the command line."""
    return [str(one) for one in value] if isinstance(value, tuple) else [str(value)]


def test_the_cases_reach_every_part_of_an_experiment():
    parts = {path.split(".")[0] for path, _, _ in CASES}
    assert parts == {field.name for field in dataclasses.fields(Experiment)}
    assert len(CASES) >= 40


@every_case
def test_a_misspelt_value_is_refused_in_python(path, value, answer):
    kind, name = class_of(path)
    required = {"model": config.ModelOptions(), "data": config.DataOptions()} if kind is Experiment else {}
    for make in (
        lambda: kind(**required, **{name: value}),
        lambda: dataclasses.replace(kind(**required), **{name: value}),
    ):
        with pytest.raises(ConfigError) as caught:
            make()
        assert name in str(caught.value)
        assert answer in str(caught.value)


@every_case
def test_in_a_config(path, value, answer, tmp_path):
    kind, name = class_of(path)
    required = "model=ModelOptions(), data=DataOptions(), " if kind is Experiment else ""
    (tmp_path / "c.py").write_text(
        f"from halfeven.config import *\n\n{kind.__name__}({required}{name}={spelt(value)})\n"
    )
    with pytest.raises(ConfigError) as caught:
        config.load_experiment(tmp_path / "c.py")
    said = str(caught.value)
    assert "c.py cannot be used (line 3)" in said
    assert name in said
    assert answer in said


@every_case
def test_on_the_command_line(path, value, answer, right_config, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", right_config, f"--{path.replace('_', '-')}", *words(value)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("ConfigError: ")
    assert "Traceback" not in said
    assert path in said or path.split(".")[-1] in said
    assert answer in said


def test_the_command_line_tells_all_mistakes_at_once(right_config, capsys):
    wrong = [case for case in CASES if case[0] not in ("quantization.scheme",)]
    arguments = [word for path, value, _ in wrong for word in (f"--{path.replace('_', '-')}", *words(value))]
    with pytest.raises(SystemExit):
        cli.main(["train", right_config, *arguments])
    said = capsys.readouterr().err
    assert said.startswith(f"ConfigError: {len(wrong)} options cannot be used")
    assert [path for path, _, _ in wrong if f"  {path}=" not in said] == []
