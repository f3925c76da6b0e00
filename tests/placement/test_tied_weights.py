"""A weight with several readers: they read the same in training, in the simulation and in the file."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.layerwise.sqnr import sqnr
from halfeven.placement.tied_weights import tied_parameters, untie
from halfeven.runtimes.runtime import load_deployed
from placement.parts import captured


class Language(nn.Module):
    """An embedding whose weight is the output layer's too, by a module or by a function."""

    def __init__(self, function=False):
        super().__init__()
        self.embed, self.inner = nn.Embedding(40, 16), nn.Linear(16, 16)
        if not function:
            self.out = nn.Linear(16, 40)
            self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.inner(self.embed(ids)).relu()
        return self.out(x) if hasattr(self, "out") else F.linear(x, self.embed.weight)


class Convolutions(nn.Module):
    """Two convolutions share a weight and a bias, and a strong BatchNorm follows one of them."""

    def __init__(self, stride=1):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, stride, padding=1)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.norm, self.out = nn.BatchNorm2d(3), nn.Linear(3, 4)
        nn.init.uniform_(self.norm.weight, 2, 4)

    def forward(self, x):
        return self.out(self.norm(self.b(self.a(x).relu())).relu().mean((2, 3)))


class Twice(nn.Module):
    """A convolution of the model, and a function that reads its weight with another stride; a BatchNorm follows one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Linear(3, 4)
        nn.init.uniform_(self.norm.weight, 2, 4)

    def forward(self, x):
        x = F.conv2d(x, self.conv.weight, stride=2).relu()
        return self.out(self.norm(self.conv(x)).relu().mean((2, 3)))


def images():
    return torch.randn(4, 3, 12, 12)


def ids():
    return torch.randint(0, 40, (4, 6))


CASES = {
    "module": (Language, ids),
    "function": (lambda: Language(function=True), ids),
    "convolutions": (Convolutions, images),
    "strides": (lambda: Convolutions(stride=2), images),
    "function of another stride": (Twice, images),
}


def check(qmodel, model, x, path, least):
    he.export(qmodel, path)
    with torch.no_grad():
        expected, simulated = model(x), qmodel(x)
        found = load_deployed(path, he.plan_of(qmodel).options.target)(x)
    assert sqnr(simulated, expected) > least
    assert sqnr(found, simulated) > 40, "the file is another function than the one that was trained"


@pytest.mark.parametrize(
    ("case", "batchnorm"),
    [
        ("convolutions", "keep"),
        ("convolutions", "fold"),
        ("convolutions", "fold live"),
        ("strides", "fold"),
        ("function of another stride", "fold"),
        ("function of another stride", "fold live"),
    ],
)
def test_folding_a_batchnorm_changes_no_other_reader(case, batchnorm, tmp_path):
    build, batch = CASES[case]
    model, x = build().eval(), batch()
    qmodel = he.calibrate(he.prepare(model, x, batchnorm=batchnorm, scheme="w7a8"), [x]).eval()
    check(qmodel, model, x, tmp_path / "m.xml", 25)
    he.save(qmodel, tmp_path / "m.safetensors")
    again = he.load(tmp_path / "m.safetensors", build(), x)
    assert torch.equal(again(x), qmodel(x))


@pytest.mark.parametrize(
    ("case", "target"),
    [("module", "openvino"), ("module", "onnxruntime"), ("function", "openvino"), ("strides", "onnxruntime")],
)
def test_the_file_reads_the_weights_that_training_reads(case, target, tmp_path):
    build, batch = CASES[case]
    model, x = build().eval(), batch()
    qmodel = he.calibrate(he.prepare(model, x, target=target, scheme="w4a8", batchnorm="fold live"), [x]).eval()
    check(qmodel, model, x, tmp_path / ("m.xml" if target == "openvino" else "m.onnx"), 8)


def test_learned_rounding_gives_the_layer_a_weight_of_its_own(tmp_path):
    model, x = Language().eval(), ids()
    qmodel = he.quantize(model, [x], scheme="w4a8", reconstruct="layers", iterations=20, example=x)
    assert torch.equal(qmodel.embed.weight, model.embed.weight)
    assert not torch.equal(qmodel.out.weight, model.out.weight)
    assert he.plan_of(qmodel).changes.untied == ("out.weight",)
    assert "out.weight" in str(he.plan_of(qmodel))
    check(qmodel, model, x, tmp_path / "m.xml", 8)
    he.save(qmodel, tmp_path / "m.safetensors")
    assert torch.equal(he.load(tmp_path / "m.safetensors", Language(), x)(x), qmodel(x))


def test_training_keeps_weights_tied():
    qmodel = he.calibrate(he.prepare(Convolutions(), x := images()), [x])
    assert qmodel.a.weight is qmodel.b.weight
    assert tied_parameters(qmodel) == ("a.weight", "a.bias", "b.weight", "b.bias")


def test_an_untied_layer_leaves_the_rest_tied():
    model = captured(Convolutions())
    assert untie(model, ["b.weight"]) == ("b.weight",)
    assert tied_parameters(model) == ("a.bias", "b.bias")
    assert untie(model, []) == ()
