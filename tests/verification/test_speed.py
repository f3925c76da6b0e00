"""The guard for speed: files and layers that are slower in integers than in float."""

import dataclasses

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.runtimes.layer_execution import KernelTime
from halfeven.verification import verify as verification
from halfeven.verification.latency import _with_layers
from halfeven.verification.layer_times import LayerTime, LayerTimes, steady_kernel_times
from halfeven.verification.speed import slower_than_float

X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LAYERS = (
    LayerTime("slow", 2.0, 1.0, integer=True),
    LayerTime("slower", 3.0, 1.0, integer=True),
    LayerTime("fast", 0.2, 1.0, integer=True),
    LayerTime("in float", 5.0, 1.0, integer=False),
    LayerTime("tiny", 0.002, 0.001, integer=True),
)


def test_layers_are_named_with_their_milliseconds_the_worst_first():
    (layers,) = slower_than_float(LayerTimes(9.0, 10.0, 10.0, LAYERS))
    worst = "slower takes 3.000 ms, and 1.000 ms in float"
    assert layers.index(worst) < layers.index("slow takes 2.000 ms")
    assert "by 3.000 ms together" in layers
    assert not any(name in layers for name in ("fast", "tiny", "5.000"))


class Profiled:
    """A file whose kernels another program interrupts now and then."""

    def __init__(self, *profiles):
        self.profiles = list(profiles)

    def kernel_times(self, inputs):
        return [KernelTime("k", (), "Convolution", "", "u8", time, integer=True) for time in self.profiles.pop(0)]


def test_a_profile_in_which_kernels_were_interrupted_is_made_again():
    file = Profiled((0.1, 0.2, 9.0), (0.1, 5.0, 0.3), (7.0, 7.0, 7.0))
    assert [kernel.milliseconds for kernel in steady_kernel_times(file, [X], whole=0.7)] == [0.1, 0.2, 0.3]
    assert len(file.profiles) == 1, "what adds up is not made again"


def test_a_profile_that_lacks_a_kernel_is_left_out():
    file = Profiled((0.1, 0.2, 9.0), (0.1, 5.0), (0.2, 0.1, 0.3))
    assert [kernel.milliseconds for kernel in steady_kernel_times(file, [X], whole=0.7)] == [0.1, 0.1, 0.3]


def test_a_layer_is_slower_if_further_profiles_say_so():
    interrupted = Profiled((2.0, 0.2), (0.2, 0.2), (0.2, 0.2))
    steady = Profiled((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))
    times = LayerTimes(deployed=5.0, float32=5.0, float_default=5.0)
    found = _with_layers(times, interrupted, steady, [X], ["k"])
    assert found.slower() == []
    assert len(interrupted.profiles) == len(steady.profiles) == 1
    slow, steady = Profiled(*[(2.0, 0.2)] * 3), Profiled(*[(1.0, 1.0)] * 3)
    assert [layer.deployed for layer in _with_layers(times, slow, steady, [X], ["k"]).slower()] == [2.0]
    assert slow.profiles == []


def test_the_file_is_compared_with_the_precision_that_it_replaces():
    found = slower_than_float(LayerTimes(deployed=8.0, float32=10.0, float_default=6.0))
    assert len(found) == 1
    assert "takes 8.000 ms, and the float file 6.000 ms" in found[0]
    assert slower_than_float(LayerTimes(deployed=6.1, float32=10.0, float_default=6.0)) == []


def test_the_estimate_exchanges_integer_layers_alone():
    times = LayerTimes(11.0, 10.0, 10.0, LAYERS)
    assert times.ratio_with(()) == pytest.approx(1.1)
    assert times.ratio_with(("slower", "in float")) == pytest.approx(0.9)
    assert times.ratio_with(("fast",)) == pytest.approx(1.18)
    profiled = [layer.name for layer in LAYERS if layer.integer]
    short = LayerTimes(0.9, 1.0, 1.0, LAYERS)  # the profile adds up to more than the run takes
    assert all(0 < short.ratio_with(names, moved) < 2 for names in ((), profiled) for moved in (0.0, 1.0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.depth, self.point = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.point(self.depth(x))).mean((2, 3)))


@pytest.mark.parametrize(("target", "name"), [("openvino", "m.xml"), ("onnxruntime", "m.onnx")])
def test_every_layer_is_timed_in_both_files(target, name, tmp_path, monkeypatch):
    seen = []

    def noted(times):
        seen.append(times)
        return ["slow"]

    monkeypatch.setattr(verification, "slower_than_float", noted)
    qmodel = he.quantize(Net().eval(), [X], scheme="w7a8", target=target)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / name), [X])
    (times,) = seen
    timed = {layer.name: layer for layer in times.layers}
    assert {"stem", "depth", "point"} <= timed.keys() <= {"stem", "depth", "point", "head"}
    assert timed["stem"].integer
    assert all(layer.floating >= 0 for layer in times.layers)
    assert report.latency_ratio_default == times.deployed / times.float_default > 0
    assert report.slower == ["slow"]
    said = str(report)
    assert f"(default type {report.latency_ratio_default:.2f})" in said
    assert said.index("SLOWER THAN FLOAT:") > said.index("latency deployed / float")
    assert "LAYERS SLOWER" in str(dataclasses.replace(report, latency_ratio_default=0.9))
    assert "LAYERS SLOWER" not in str(dataclasses.replace(report, latency_ratio_default=1.2))
