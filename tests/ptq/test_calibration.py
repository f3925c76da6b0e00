"""Calibration sets every range once, and leaves everything else alone."""

import copy

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CalibrationError
from halfeven.quantizer import quantizers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.drop(torch.relu(self.bn(self.conv(x))).mean((2, 3))))


@pytest.fixture
def data():
    return [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]


@pytest.fixture
def qmodel(data):
    return he.prepare(Net(), data[0], activation_observer="minmax")


def test_every_range_is_set_and_nothing_else_changes(qmodel, data):
    qmodel.train()
    qmodel.get_submodule("bn").eval()
    before = {k: v.clone() for k, v in qmodel.state_dict().items() if "quantizer" not in k}
    he.calibrate(qmodel, data)
    assert all(q.calibrated and torch.isfinite(q.scale).all() for q in quantizers(qmodel).values())
    assert all(torch.equal(v, qmodel.state_dict()[k]) for k, v in before.items())
    assert qmodel.training, "the model comes back in the mode it was in"
    assert not qmodel.get_submodule("bn").training, "each module in its own"


def test_the_input_range_is_that_of_all_batches(qmodel, data):
    he.calibrate(qmodel, data)
    quantizer = quantizers(qmodel)["quantizers.x"]
    everything = torch.cat(data)
    assert float(quantizer.low) == float(everything.min())
    assert float(quantizer.high) == float(everything.max())


def test_batches_limits_how_many_are_taken(qmodel, data):
    he.calibrate(qmodel, data, batches=1)
    assert float(quantizers(qmodel)["quantizers.x"].high) == float(data[0].max())


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x, torch.zeros(4)), lambda x: [x], lambda x: {"x": x, "labels": torch.zeros(4)}]
)
def test_tensors_pairs_and_dicts_are_batches(data, wrap):
    qmodel = he.prepare(Net(), data[0])
    he.calibrate(qmodel, [wrap(x) for x in data])
    assert quantizers(qmodel)["quantizers.x"].calibrated


def test_activations_are_observed_behind_quantized_weights(data):
    torch.manual_seed(0)
    net = Net()
    coarse = he.calibrate(he.prepare(net, data[0], scheme="w2a8", activation_observer="minmax"), data)
    fine = he.calibrate(he.prepare(net, data[0], scheme="w8a8", activation_observer="minmax"), data)
    name = next(n for n in quantizers(fine) if n.endswith("relu"))
    assert float(quantizers(coarse)[name].high) != pytest.approx(float(quantizers(fine)[name].high), rel=1e-3)


def test_no_batch_is_an_error(qmodel):
    with pytest.raises(CalibrationError, match="no batch"):
        he.calibrate(qmodel, [])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_names_the_tensor_and_leaves_the_ranges(qmodel, data, bad):
    he.calibrate(qmodel, data)
    before = copy.deepcopy(qmodel.state_dict())
    spoilt = data[0].clone()
    spoilt[0, 0, 0, 0] = bad
    with pytest.raises(CalibrationError, match=r"for x: a batch holds NaN or infinite values"):
        he.calibrate(qmodel, [spoilt])
    assert all(torch.equal(v, before[k]) for k, v in qmodel.state_dict().items())
    qmodel(data[0])


def test_an_uncalibrated_model_says_so(qmodel, data):
    with pytest.raises(CalibrationError, match=r"x has no range yet.*calibrate"):
        qmodel.eval()(data[0])
