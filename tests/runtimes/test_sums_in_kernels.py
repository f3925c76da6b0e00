"""Residual sums run in the kernel of the convolution before them in OpenVINO, also where all sizes are fixed."""

import openvino
import pytest
import torch
from torch import nn

import halfeven as he
from runtimes.parity import SCHEME
from sweeps import sweep


class Block(nn.Module):
    """A residual sum, in either order of its operands, and what follows it."""

    def __init__(self, channels, activation, skip_first, bias, kernel=3):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        self.b = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=bias)
        self.activation, self.skip_first = activation, skip_first

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        return self.activation(x + y if self.skip_first else y + x)


def kernels_of_their_own(model):
    """The sums that a model computes outside of a layer's kernel."""
    compiled = openvino.Core().compile_model(model, "CPU", {"EXECUTION_MODE_HINT": "ACCURACY"})
    infos = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
    kinds = {info["originalLayersNames"].astype(str): info["layerType"].astype(str) for info in infos}
    sums = [kind for names, kind in kinds.items() if "aten.add" in names and kind not in ("Convolution", "Reorder")]
    return compiled, sums


@pytest.mark.parametrize(
    ("activation", "skip_first", "bias"),
    [(nn.ReLU(), False, True), (nn.Identity(), True, True), (nn.ReLU6(), False, False), (nn.Identity(), False, False)],
)
def test_no_sum_has_a_kernel_of_its_own(activation, skip_first, bias, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    blocks = [Block(16, activation, skip_first, bias) for _ in range(2)]
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.PReLU(), *blocks, nn.Conv2d(16, 4, 1)).eval()
    qmodel = he.calibrate(he.prepare(net, x, scheme=SCHEME), [x])
    path = he.export(qmodel, tmp_path / "model.xml")
    model = openvino.Core().read_model(path)
    compiled, sums = kernels_of_their_own(model)
    assert not sums
    free = compiled([x.numpy()])[0]
    model.reshape(list(x.shape))
    compiled, sums = kernels_of_their_own(model)
    assert not sums
    assert (compiled([x.numpy()])[0] == free).all()
    report = he.verify(qmodel, path, [x, torch.randn(2, 3, 16, 16)], timed=False)
    assert report.integer_match == 1
    assert report.output_difference == 0


def test_onnx_files_for_openvino_have_no_mark(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Block(16, nn.ReLU(), False, True), nn.Conv2d(16, 4, 1)).eval()
    qmodel = he.calibrate(he.prepare(net, x, scheme=SCHEME), [x])
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.onnx"), [x], timed=False)
    assert report.integer_match == 1


class Moved(nn.Module):
    """A skip connection that an operator has moved since it was quantized, as a ResNet's first one is pooled."""

    def __init__(self, move, channels=24):
        super().__init__()
        self.stem, self.move = nn.Conv2d(3, channels, 3, padding=1), move
        self.block, self.last = Block(channels, nn.ReLU(), False, True), nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        return self.last(self.block(self.move(torch.relu(self.stem(x)))))


MOVES = {
    "pooled": nn.MaxPool2d(3, 2, 1),
    "enlarged": nn.Upsample(scale_factor=2),
    "shuffled": nn.ChannelShuffle(2),
}


@pytest.mark.parametrize("name", sweep(MOVES, "pooled"))
def test_a_moved_skip_connection_is_added_as_in_the_file(name, tmp_path):
    """No tensor between the quantizers is an output of the watched file; one integer in 20,000 shows it."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 8, 3, 48, 48)
    qmodel = he.calibrate(he.prepare(Moved(MOVES[name]).eval(), x, scheme=SCHEME), [x])
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), [x, y], timed=False)
    assert report.integer_match == 1
    assert report.output_difference == 0


@pytest.mark.parametrize("per_channel", [True, False])
def test_the_mark_of_a_watched_sum_rounds_as_an_operator_of_its_own(per_channel, tmp_path):
    """Ranges that differ by channel are applied by a product and a sum; three integers of a million show it."""
    torch.manual_seed(0)
    x = torch.randn(16, 8, 48, 48)
    block = nn.Sequential(nn.Conv2d(8, 32, 1), nn.LeakyReLU(0.25), Block(32, nn.Identity(), True, False, kernel=1))
    model = nn.Sequential(block, nn.Conv2d(32, 8, 1)).eval()
    qmodel = he.calibrate(he.prepare(model, x, scheme=SCHEME, per_channel=per_channel), [x])
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), [x], timed=False)
    assert report.alone_match == 1
    assert sum(tensor.count for tensor in report.tensors) > 2**20


class Upsampled(nn.Module):
    """A skip connection that the plugin copies to another layout, so that a sum with it stays in the kernel."""

    def __init__(self):
        super().__init__()
        self.up, self.last = nn.ConvTranspose1d(8, 16, 16, 8, 4), nn.Conv1d(16, 4, 1)
        self.block = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x):
        x = self.up(x)
        return self.last(x + self.block(nn.functional.leaky_relu(x, 0.1)))


def test_a_watched_sum_that_stays_in_the_convolutions_kernel_is_not_rounded_before(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 8, 512)
    qmodel = he.calibrate(he.prepare(Upsampled().eval(), x, scheme=SCHEME), [x])
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), [x], timed=False)
    assert report.alone_match == 1
    assert report.output_difference == 0


class AddsToPart(nn.Module):
    """DPN's block: the skip connection is a part of a tensor, of which another part is read too."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 4, 1)
        self.block = nn.Sequential(nn.Conv2d(32, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 1, bias=False))

    def forward(self, x):
        x = self.stem(x)
        return self.last(torch.cat([x[:, :16] + self.block(x), x[:, 16:]], 1))


def test_a_sum_with_a_part_of_a_tensor_rounds_as_in_the_file(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 64, 64)
    qmodel = he.calibrate(he.prepare(AddsToPart().eval(), x, scheme=SCHEME), [x])
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), [x], timed=False)
    assert report.alone_match == 1
    assert report.output_difference == 0
