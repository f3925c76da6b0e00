"""Whatever a public function is given, only halfeven's own errors come out, and they name what was wrong."""

import contextlib
import copy
import inspect
import pkgutil
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CalibrationError, ConfigError, HalfevenError
from halfeven.ptq.options import PTQOptions
from halfeven.tasks import Classification

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LOADER = [IMAGES]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.pool(self.relu(self.norm(self.conv(x)))).flatten(1))


class DetectorNet(Net):
    """A network with its own loss and boxes, which task functions take."""

    def loss(self, outputs, targets):
        return outputs.sum()

    def detect(self, outputs):
        return []


def documented():
    """The functions of the API page, and those of the package; callbacks of trainers need extras, and are classes."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    names = [*re.findall(r"^::: (halfeven\.\S+)", page, re.MULTILINE), *(f"halfeven.{name}" for name in he.__all__)]
    names = [name for name in names if not name.startswith("halfeven.integrations.")]
    found = {name.rpartition(".")[2]: pkgutil.resolve_name(name) for name in names}
    return {name: function for name, function in found.items() if inspect.isfunction(function)}


FUNCTIONS = documented()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A float model, a quantized one, its files, and the right value of every parameter."""
    folder = tmp_path_factory.mktemp("right")
    qmodel = he.calibrate(he.prepare(Net(), IMAGES, scheme="w7a8", batchnorm="fold"), LOADER).eval()
    he.save(qmodel, folder / "q.safetensors")
    he.export(qmodel, folder / "m.xml")
    return folder, qmodel


def right(name, made, tmp_path):
    """The right arguments of a function, by the names of its parameters."""
    folder, qmodel = made
    takes = inspect.signature(FUNCTIONS[name]).parameters
    files = {"load": "q.safetensors", "read_facts": "q.safetensors", "verify": "m.xml", "load_deployed": "m.xml"}
    float_model = name in ("plan", "prepare", "quantize", "load", "freeze", "quantizers", "set_observing", "evaluate")
    values = {
        "qmodel": copy.deepcopy(qmodel),
        "model": Net() if float_model else copy.deepcopy(qmodel),
        "float_model": Net(),
        "detector": DetectorNet(),
        "example": IMAGES,
        "loader": [(IMAGES, torch.zeros(2, dtype=torch.long))] if name == "evaluate" else LOADER,
        "batches": LOADER if "Iterable" in str(takes.get("batches")) else 1,
        "path": folder / files[name] if name in files else tmp_path / ("x.xml" if name == "export" else "x"),
        "rules": he.Rule(pattern="head", weight_bits=4),
        "task": Classification(3),
        "on": True,
        "options": PTQOptions(iterations=1, memory=1e-6),
        "timed": False,
    }
    wanted = {key for key, p in takes.items() if p.default is p.empty} | {"timed"}
    wanted |= {"options"} if name in ("adaround", "reconstruct", "correct_biases") else set()
    return {key: values[key] for key in takes if key in wanted & values.keys()}


def raising():
    yield IMAGES
    raise OSError("the disk of the images is gone")


def wrong_values(qmodel, tmp_path):
    damaged = tmp_path / "damaged.xml"
    damaged.write_bytes(b"<net \x00")
    with open(damaged) as closed:
        pass
    return {
        "None": None,
        "a text": "nonsense",
        "a number": 3.5,
        "a negative number": -1,
        "NaN": float("nan"),
        "bytes": b"\x00",
        "an array": np.zeros((2, 1, 8, 8), np.float32),
        "a tensor of another shape": torch.zeros(1),
        "a tensor of integers": torch.zeros(2, 1, 8, 8, dtype=torch.int64),
        "a tensor on another device": IMAGES.to("meta"),
        "a tensor of NaN": torch.full_like(IMAGES, torch.nan),
        "an empty list": [],
        "a list of nothing": [None],
        "a list of NaN": [torch.full_like(IMAGES, torch.nan)],
        "a list of other shapes": [torch.zeros(2, 3, 5, 5)],
        "a dict": {"a": 1},
        "a generator that raises": raising(),
        "a class": nn.Linear,
        "a function": lambda *_: None,
        "a bound method": qmodel.forward,
        "a model without parameters": nn.Identity(),
        "a model on another device": Net().to("meta"),
        "another model": nn.Sequential(nn.Linear(7, 2)),
        "a float model": Net(),
        "a quantized model": copy.deepcopy(qmodel),
        "a closed file": closed,
        "a missing file": tmp_path / "missing.xml",
        "a folder": tmp_path,
        "a damaged file": damaged,
    }


FEW = 3
"""Faults of each parameter in the suite; all of them with --exhaustive."""
SLOW = ("diagnose", "sensitivities", "setup_qat", "verify", "quantize")
"""Functions of which the suite tries one fault of each parameter."""


def call(function, arguments):
    result = function(**arguments)
    if hasattr(result, "__enter__"):
        with result:
            pass


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_errors_of_halfeven_come_out(name, made, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)  # a text may be the path of a file that is written
    function = FUNCTIONS[name]
    draw = random.Random(name)
    for parameter, described in inspect.signature(function).parameters.items():
        if described.kind is described.VAR_KEYWORD:
            continue
        values = wrong_values(made[1], tmp_path)
        if not request.config.getoption("--exhaustive"):
            values = {fault: values[fault] for fault in draw.sample(list(values), 1 if name in SLOW else FEW)}
        for value in values.values():
            with contextlib.suppress(HalfevenError):
                call(function, right(name, made, tmp_path) | {parameter: value})
        with pytest.raises(HalfevenError, match=parameter):
            call(function, right(name, made, tmp_path) | {parameter: object()})


def test_missing_and_unknown_arguments_are_errors_of_python():
    with pytest.raises(TypeError, match=r"calibrate\(\) missing 1 required positional argument: 'loader'"):
        he.calibrate(Net())
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        he.export(Net(), "x.xml", colour="red")


@pytest.mark.parametrize("value", [None, "x", np.zeros((2, 1, 8, 8), np.float32), [None]])
def test_calls_of_models_and_files(made, value):
    folder, qmodel = made
    deployed = he.load_deployed(folder / "m.xml")
    for call in (qmodel, he.exact(qmodel), deployed):
        with pytest.raises(HalfevenError, match=r"input|argument|given"):
            call(value)
    for odd in (torch.zeros(2, 7, 8, 8), torch.zeros(3)):
        for call in (he.exact(qmodel), deployed):
            with pytest.raises(HalfevenError) as error:
                call(odd)
            assert "x" in str(error.value)


def test_the_cause_is_kept_and_the_place_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return x @ torch.zeros(17, 4)

    with pytest.raises(HalfevenError, match="shapes cannot be multiplied") as error:
        he.prepare(Odd(), IMAGES)
    assert error.value.__cause__ is not None
    qmodel = he.prepare(Net(), IMAGES)
    with pytest.raises(CalibrationError, match=r"loader could not give batch 1 .*OSError: the disk") as error:
        he.calibrate(qmodel, raising())
    assert isinstance(error.value.__cause__, OSError)


def test_common_mistakes_have_advice():
    for wrong, advice in ((Net, r"Make a model of the class: Net\("), (Net().forward, "model that the method belongs")):
        with pytest.raises(ConfigError, match=advice):
            he.prepare(wrong, IMAGES)
    with pytest.raises(ConfigError, match=r"torch\.from_numpy"):
        he.prepare(Net(), IMAGES.numpy())
    with pytest.raises(ConfigError, match=r"\[batch\]"):
        he.calibrate(he.prepare(Net(), IMAGES), {"x": IMAGES})


def test_wrong_plans_and_rules_are_refused(made):
    plan = he.plan_of(made[1])
    for wrong in (None, {}, {"options": 3}, [], "x"):
        with pytest.raises(HalfevenError):
            he.Plan.from_dict(wrong)
        with pytest.raises(HalfevenError, match="rules"):
            plan.with_rules(wrong)
