"""Loaders of several inputs: from calibration to the verified file, and what a first batch says without an example."""

from collections import namedtuple

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CalibrationError, ConfigError
from halfeven.layerwise.batches import inputs_in
from halfeven.layerwise.outputs import quantized_outputs
from halfeven.layerwise.re_estimate import re_estimate
from halfeven.ptq.reconstruction.reconstruct import adaround
from halfeven.quantization.model_quantizers import quantizers

pytestmark = pytest.mark.usefixtures("unfused")


class Two(nn.Module):
    """Two inputs, the second of which may be optional."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 6), nn.Linear(4, 6)
        self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x, condition):
        return self.out(self.norm(self.left(x).relu() + self.right(condition).relu()))


class Optional(Two):
    def forward(self, x, condition=None):
        y = self.left(x).relu()
        return self.out(self.norm(y if condition is None else y + self.right(condition).relu()))


class Masked(Two):
    """An optional second input that a class label cannot be."""

    def forward(self, x, mask=None):
        return self.out(self.norm(self.left(x if mask is None else x * mask[:, :8]).relu()))


def loader(count=3):
    return [(torch.randn(5, 8), torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(count)]


@pytest.mark.parametrize(("target", "name"), [("openvino", "m.xml"), ("onnxruntime", "m.onnx")])
def test_a_loader_of_two_inputs_and_labels(target, name, tmp_path):
    model = Two().eval()
    batches = loader()
    qmodel = he.prepare(model, batches[0][:2], target=target, scheme="w7a8", batchnorm="fold")
    he.calibrate(qmodel, batches)
    he.export(qmodel.eval(), tmp_path / name)
    report = he.verify(qmodel, tmp_path / name, batches, model, timed=False)
    assert report.integer_match == 1
    assert report.samples == 15
    assert set(report.accuracy) == {"float", "simulated", "deployed"}


def test_an_input_that_is_no_tensor_is_no_input_of_the_file(tmp_path):
    class Switched(Two):
        def forward(self, x, mask=None, double=False, condition=None):
            y = self.left(x) * (2 if double else 1)
            return self.out((y if condition is None else y + self.right(condition)).relu())

    batch = {"x": torch.randn(5, 8), "mask": None, "double": True, "condition": torch.randn(5, 4)}
    qmodel = he.calibrate(he.prepare(Switched().eval(), batch, scheme="w7a8"), [batch]).eval()
    for target, name in (("openvino", "m.xml"), ("onnxruntime", "m.onnx")):
        he.export(qmodel, tmp_path / name, target=target)
        without = {"x": batch["x"], "condition": batch["condition"], "labels": torch.zeros(5)}
        assert he.verify(qmodel, tmp_path / name, [without], target=target, timed=False).integer_match == 1


@pytest.mark.parametrize("form", ["tuples", "nested", "dicts"])
def test_every_algorithm_reads_the_same_inputs(form):
    model = Two().eval()
    batches = loader()
    expected = he.quantize(model, batches, example=batches[0][:2])
    make = {
        "tuples": lambda x, c, y: (x, c, y),
        "nested": lambda x, c, y: ((x, c), y),
        "dicts": lambda x, c, y: {"condition": c, "x": x, "labels": y},
    }[form]
    found = he.quantize(model, [make(*batch) for batch in batches])
    inputs = [x for x in quantized_outputs(expected, batches)]
    for mine, its in zip(quantized_outputs(found, [make(*batch) for batch in batches]), inputs, strict=True):
        assert torch.equal(mine, its)
    qmodel = he.calibrate(he.prepare(model, batches[0][:2]), batches)
    re_estimate(qmodel, batches)
    adaround(qmodel, batches)


def test_an_optional_input_is_asked_for_and_kept():
    model = Optional().eval()
    batches = [batch[:2] for batch in loader()]
    with pytest.raises(ConfigError, match=r"the first 1 .* the first 2 \(x, condition\)"):
        he.quantize(model, batches)
    qmodel = he.quantize(model, batches, example=batches[0])
    assert "right.weight_quantizer" in quantizers(qmodel)
    alone = he.quantize(model, batches, example=batches[0][0])
    assert alone(batches[0][0]).shape == (5, 3)


def test_a_label_that_no_optional_input_can_be_is_a_label():
    batches = loader()
    args, kwargs = inputs_in(Masked().eval(), (batches[0][0], batches[0][2]))
    assert len(args) == 1
    assert not kwargs
    assert len(inputs_in(Masked().eval(), (batches[0][0], None))[0]) == 1


def test_a_dict_gives_what_forward_takes():
    x, c, y = loader(1)[0]
    named = {"condition": c, "x": x, "labels": y, "ids": y}
    for batch in (named, namedtuple("Batch", named)(**named)):
        assert list(inputs_in(Two(), batch)[1]) == ["condition", "x"]


def test_the_batch_that_does_not_fit_is_named_and_ranges_stay():
    qmodel = he.calibrate(he.prepare(Two().eval(), loader()[0][:2]), loader())
    before = {name: q.scale.clone() for name, q in quantizers(qmodel).items()}
    bad = [*loader(2), (torch.randn(5, 8), None)]
    with pytest.raises(CalibrationError, match=r'Batch 2 .*"condition" as None'):
        he.calibrate(qmodel, bad)
    assert all(torch.equal(q.scale, before[name]) for name, q in quantizers(qmodel).items())
