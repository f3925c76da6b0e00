"""Names in files: those of the model's forward and of its outputs, in every runtime; and facts about the file."""

import json
from collections import namedtuple

import onnx
import onnxruntime
import openvino
import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import ConfigError

FILES = {"openvino": "model.xml", "onnxruntime": "model.onnx", "tensorrt": "model.onnx"}
Found = namedtuple("Found", ["logits", "features"])


class Words(nn.Module):
    """Token ids with a mask of integers, and a form of the outputs."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.words, self.middle, self.last = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask):
        y = self.middle(self.words(input_ids)).relu() * attention_mask[:, :, None].float()
        return self.form(y.mean(1), self.last(y).sigmoid())


BATCH = {"input_ids": torch.randint(0, 50, (2, 6)), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
FORMS = {
    "dict": (lambda a, b: {"pooled": a, "scores": b}, ["pooled", "scores"]),
    "tuple": (lambda a, b: (a, b), ["output_0", "output_1"]),
    "named tuple": (Found, ["logits", "features"]),
    "nested": (lambda a, b: {"levels": [a, b], "sum": a + 1}, ["levels_0", "levels_1", "sum"]),
    "alone": (lambda a, b: b, ["output"]),
    "twice": (lambda a, b: {"first": a, "second": a}, ["first", "second"]),
}


def quantized(model, batch, target, **options):
    scheme = "w8a8" if target == "tensorrt" else "w7a8"
    return he.quantize(model.eval(), [batch], scheme=scheme, target=target, **options)


def names_in(path):
    """The names that a user of the file sees: inputs and outputs, each alone."""
    if path.suffix == ".xml":
        model = openvino.Core().read_model(path)
        assert [port.names for port in (*model.inputs, *model.outputs) if len(port.names) != 1] == []
        compiled = openvino.Core().compile_model(model, "CPU")
        assert all(port.any_name in compiled.outputs[i].names for i, port in enumerate(model.outputs))
        return [port.any_name for port in model.inputs], [port.any_name for port in model.outputs]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [known.name for known in session.get_inputs()], [known.name for known in session.get_outputs()]


@pytest.mark.parametrize(
    ("form", "target"),
    [
        *((form, "openvino") for form in ("dict", "nested", "alone")),
        *((form, "onnxruntime") for form in ("dict", "tuple", "named tuple", "twice")),
    ],
)
def test_names_are_those_of_the_model(form, target, tmp_path):
    build, outputs = FORMS[form]
    qmodel = quantized(Words(build), BATCH, target=target)
    path = he.export(qmodel, tmp_path / FILES[target])
    assert names_in(path) == (["input_ids", "attention_mask"], outputs)
    if form == "dict":
        report = he.verify(qmodel, path, [BATCH], timed=False)
        assert report.integer_match == 1
        assert report.unseen == []


class NamedByTensors(nn.Module):
    """Outputs with the names of a buffer, a parameter, a layer, an input, and a tensor that the file has."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("shift", torch.randn(3))
        self.factor = nn.Parameter(torch.randn(3))

    def forward(self, x):
        y = self.last(self.first(x).relu())
        names = ("shift", "factor", "first", "x", "last.weight", "first.weight.integers")
        return dict(zip(names, (y + self.shift, y * self.factor, y - 1, y / 2, y + 2, y * 3), strict=True))


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_outputs_may_have_the_names_of_tensors(target, tmp_path):
    model, x = NamedByTensors(), torch.randn(4, 8)
    qmodel = quantized(model, x, target)
    path = he.export(qmodel, tmp_path / FILES[target])
    keys = [f"{key}_output" if key == "x" else key for key in model(x)]
    assert names_in(path) == (["x"], keys)
    assert he.verify(qmodel, path, [x], timed=False).integer_match == 1


class Quantized(nn.Module):
    """Outputs that are quantized tensors, an output that has an input's name, and one that an operator has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.a(x).relu()
        return {"y": y, "x": self.b(y), "convolution": y + 1}


@pytest.mark.parametrize("target", FILES)
def test_names_of_quantized_outputs(target, tmp_path):
    x = torch.randn(2, 3, 4, 4)
    qmodel = quantized(Quantized(), x, target=target, quantize_outputs=True)
    path = he.export(qmodel, tmp_path / FILES[target])
    assert names_in(path) == (["x"], ["y", "x_output", "convolution"])
    report = he.verify(qmodel, path, [x], timed=False)
    assert report.integer_match > 0.999
    assert report.unseen == []


class Told(nn.Module):
    """Returns what a file cannot hold beside its tensors, and a tensor twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        told = {"stride": 4, "layout": "NCHW", "samples": len(x), "size": x.shape[0], "none": None}
        return {"map": y, **told, "mean": y.mean((2, 3)), "again": y}


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_outputs_that_are_no_tensors_are_left_out(target, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    qmodel = he.calibrate(he.prepare(Told(), x, scheme="w7a8", target=target), [x]).eval()
    assert qmodel(x)["stride"] == 4
    report = he.verify(qmodel, he.export(qmodel, tmp_path / FILES[target]), [x], timed=False)
    assert [output.name for output in report.outputs] == ["map", "mean", "again"]
    assert report.integer_match == 1.0


@pytest.mark.parametrize("target", FILES)
def test_names_that_the_user_gives(target, tmp_path):
    x = torch.randn(2, 3, 4, 4)
    qmodel = quantized(Quantized(), x, target=target)
    path = tmp_path / FILES[target]
    he.export(qmodel, path, input_names=["images"], output_names=["a", "b", "c"])
    assert names_in(path) == (["images"], ["a", "b", "c"])
    for wrong in ({"input_names": []}, {"output_names": ["a", "b"]}, {"output_names": ["a", "b", "b"]}):
        with pytest.raises(ConfigError, match="does not name the model's"):
            he.export(qmodel, path, **wrong)
    with pytest.raises(ConfigError, match="an input and an output"):
        he.export(qmodel, path, output_names=["a", "b", "x"])


@pytest.mark.parametrize("target", FILES)
def test_a_file_says_what_it_is(target, tmp_path):
    x = torch.randn(2, 3, 4, 4)
    qmodel = quantized(Quantized(), x, target=target, dynamic_shapes={"x": {2: "height", 3: "width"}})
    path = he.export(qmodel, tmp_path / FILES[target], metadata={"preprocessing": "RGB from 0 to 1"})
    facts = metadata_in(path)
    assert facts["version"] == he.__version__
    assert facts["scheme"] == ("w8a8" if target == "tensorrt" else "w7a8")
    assert facts["target"] == target
    assert facts["preprocessing"] == "RGB from 0 to 1"
    assert json.loads(facts["axes"]) == {"x": {"0": "batch", "2": "height", "3": "width"}}
    settings = {"openvino": "EXECUTION_MODE_HINT=ACCURACY", "onnxruntime": "WeightBiasQuantization", "tensorrt": ""}
    assert settings[target] in facts["settings"]


def test_metadata_of_halfevens_own_are_refused(tmp_path):
    qmodel = quantized(Quantized(), torch.randn(2, 3, 4, 4), target="onnxruntime")
    for name in ("version", "scheme", "target", "settings", "float_precision", "axes"):
        with pytest.raises(ConfigError, match=f"metadata has {name}, which halfeven writes itself"):
            he.export(qmodel, tmp_path / "model.onnx", metadata={name: "mine", "other": "kept"})
    assert not list(tmp_path.iterdir())


def metadata_in(path):
    if path.suffix == ".xml":
        found = openvino.Core().read_model(path).get_rt_info("halfeven")
        return {name: str(value) for name, value in found.value.items()}
    model = onnx.load(path)
    assert model.producer_name == "halfeven"
    return {entry.key.removeprefix("halfeven."): entry.value for entry in model.metadata_props}
