"""Checkpoints give the same model back, and say what differs where they cannot."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from halfeven.checkpoint import read_facts, read_tensors, save, write_tensors
from halfeven.errors import CheckpointError
from halfeven.layerwise.calibrate import calibrate
from halfeven.pipelines import load, prepare
from halfeven.placement.insertion import plan_of
from halfeven.quantization.model_quantizers import quantizers


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 3)
        self.register_buffer(
            "phases", torch.polar(torch.ones(3), torch.arange(3.0))
        )  # a complex one, that nothing reads

    def forward(self, x):
        return self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(F.relu(self.first(x)))


def quantized(model, example, **options):
    return calibrate(prepare(model, example, **options), [example]).eval()


@pytest.fixture
def images():
    return torch.randn(4, 1, 8, 8)


@pytest.mark.parametrize("ranges", ["observed", "learned"])
def test_a_saved_model_is_loaded_as_it_was(tmp_path, images, ranges):
    qmodel = quantized(Net(), images, ranges=ranges, scheme="w4a8")
    save(qmodel, tmp_path / "q.safetensors", {"float": {"top1": 12.5}})
    again = load(tmp_path / "q.safetensors", Net(), images)
    assert plan_of(again) == plan_of(qmodel)
    assert torch.equal(again(images), qmodel(images))
    first, second = qmodel.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert read_facts(tmp_path / "q.safetensors")["extra"] == {"float": {"top1": 12.5}}


def test_observers_stay_off_after_loading(tmp_path, images):
    qmodel = quantized(Net(), images)
    for quantizer in quantizers(qmodel).values():
        quantizer.set_observing(False)
    save(qmodel, tmp_path / "q.safetensors")
    again = load(tmp_path / "q.safetensors", Net(), images).train()
    before = {name: q.scale.clone() for name, q in quantizers(again).items()}
    again(images * 100)
    assert all(torch.equal(before[name], q.scale) for name, q in quantizers(again).items())


def test_tied_weights_are_written_once_and_stay_tied(tmp_path):
    example = torch.randn(2, 4)
    qmodel = quantized(Tied(), example)
    save(qmodel, tmp_path / "q.safetensors")
    with safe_open(tmp_path / "q.safetensors", "pt") as file:
        same = json.loads(file.metadata()["same"])
    assert {*same.items()} <= {("first.weight", "second.weight"), ("second.weight", "first.weight")}
    assert len(same) == 1
    again = load(tmp_path / "q.safetensors", Tied(), example)
    assert again.first.weight is again.second.weight
    assert torch.equal(again(example), qmodel(example))


def test_views_of_one_storage_are_written_whole(tmp_path):
    whole = torch.arange(6.0)
    state = {
        "all": whole,
        "half": whole[:3],
        "turned": whole.view(2, 3).T,
        "none": torch.empty(0),
        "also none": torch.empty(0),
    }
    write_tensors(state, tmp_path / "s.safetensors", {})
    found, _ = read_tensors(tmp_path / "s.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_what_differs_is_listed(tmp_path, images):
    save(quantized(Net(), images), tmp_path / "q.safetensors")
    with pytest.raises(
        CheckpointError, match=r"(?s)not a checkpoint of this model.*conv\.weight \(4, 1, 3, 3\) instead of \(5"
    ):
        load(tmp_path / "q.safetensors", Net(width=5), images)


def test_missing_and_unexpected_tensors(tmp_path, images):
    qmodel = quantized(Net(), images)
    save(qmodel, tmp_path / "q.safetensors")
    state, facts = read_tensors(tmp_path / "q.safetensors")
    state["stranger"] = state.pop("fc.bias")
    write_tensors(state, tmp_path / "q.safetensors", facts)
    with pytest.raises(CheckpointError, match=r"(?s)missing \(1\): fc\.bias.*unexpected \(1\): stranger"):
        load(tmp_path / "q.safetensors", Net(), images)


def test_float_weights_are_refused(tmp_path, images):
    save_file(Net().state_dict(), tmp_path / "f.safetensors")
    with pytest.raises(CheckpointError, match="weights without a plan"):
        load(tmp_path / "f.safetensors", Net(), images)


def test_a_later_format_is_refused(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "f.safetensors", {"format": "2", "halfeven": "9.9"})
    with pytest.raises(CheckpointError, match=r"format 2, written by halfeven 9\.9"):
        read_facts(tmp_path / "f.safetensors")


def test_a_learned_zero_point_may_lie_far_beyond_the_grid(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2))
    x = torch.randn(4, 8)
    qmodel = calibrate(prepare(model, x, scheme="w4a4", learn_zero_points=True), [x]).eval()
    qmodel.quantizers.get_submodule("1_gelu").zero_point.data.fill_(400.0)
    save(qmodel, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors", model, x)(x), qmodel(x))


def test_a_model_that_was_converted_is_loaded_in_its_precision(tmp_path):
    x = torch.randn(4, 1, 8, 8)
    model = Net().eval()
    qmodel = calibrate(prepare(model, x), [x]).bfloat16()
    save(qmodel, tmp_path / "m.safetensors")
    for float_model in (model, Net().bfloat16()):
        again = load(tmp_path / "m.safetensors", float_model, x.to(next(float_model.parameters()).dtype))
        assert again.conv.weight.dtype == torch.bfloat16
        assert torch.equal(again(x.bfloat16()), qmodel.eval()(x.bfloat16()))
