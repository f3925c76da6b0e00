"""Ties on the real runtimes: scales that are powers of two, odd zero points, and shapes drawn at random, row by row."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.quantization.model_quantizers import quantizers
from halfeven.runtimes.cpu import adds_pairs_in_16_bits
from runtimes.parity import SideBySide, quantized
from runtimes.test_exact import Concat, Excite, Function, Residual, Split, body, conv
from sweeps import sweep

FILES = {"onnxruntime": "model.onnx", "openvino": "model.xml"}

LINEAR = (6, 16)
TOKENS = (3, 5, 16)
ROWS = {
    "conv": (lambda: nn.Sequential(conv(3), nn.ReLU(), conv(8, 4)), None),
    "conv without activation": (lambda: nn.Sequential(conv(3), conv(8, 4)), None),
    "depthwise": (lambda: nn.Sequential(conv(3), nn.ReLU6(), conv(8, 8, groups=8), nn.ReLU6(), conv(8, 4, 1)), None),
    "strided, dilated": (lambda: nn.Sequential(conv(3, stride=2), nn.ReLU(), conv(dilation=2), conv(8, 4)), None),
    "linear": (lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 4)), LINEAR),
    "linear on tokens": (lambda: nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)), TOKENS),
    "matrix product": (
        lambda: nn.Sequential(nn.Linear(16, 16), Function(lambda x: x @ x.transpose(1, 2)), nn.Linear(5, 4)),
        TOKENS,
    ),
    "addition": (lambda: Residual(act=lambda x: x, signed=True), None),
    "addition, relu": (lambda: Residual(), None),
    "multiplication": (lambda: body(Function(lambda x: x * x.flip(1))), None),
    "gate": (lambda: Excite(F.hardsigmoid), None),
    "concatenation": (lambda: Concat(), None),
    "split": (lambda: Split(), None),
    "average pool": (lambda: nn.Sequential(conv(3), nn.AvgPool2d(2), conv(8, 4)), None),
    "mean": (lambda: nn.Sequential(conv(3), Function(lambda x: x.mean((2, 3))), nn.Linear(8, 4)), None),
    "max pool": (lambda: body(nn.MaxPool2d(2)), None),
    "nearest": (lambda: body(nn.Upsample(scale_factor=2)), None),
}


def made_of_halves(qmodel, generator):
    """Scales become powers of two and zero points odd, weights multiples of 1/128: sums lie between two integers."""
    for quantizer in quantizers(qmodel).values():
        if quantizer.weight or quantizer.state.fixed:
            continue
        quantizer._store_range(2.0 ** torch.round(torch.log2(quantizer.scale)), quantizer.zero_point)
        if not quantizer.scheme.symmetric:
            zero_point = 2 * int(torch.randint(20, 108, (), generator=generator)) + 1
            quantizer.zero_point.fill_(zero_point)
    for module in qmodel.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = torch.randint(-127, 128, module.weight.shape, generator=generator) / 128
            module.weight.data.flatten(1)[:, 0] = 127 / 128
            if module.bias is not None:
                module.bias.data = torch.randint(-64, 65, module.bias.shape, generator=generator) / 64


def assert_equal_at_ties(model, shape, target, generator, folder):
    qmodel, batches = quantized(model, shape, target=target)
    made_of_halves(qmodel, generator)
    path = he.export(qmodel, folder / FILES[target])
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match == 1.0, (report.first_difference, report.max_lsb_difference)
    assert report.output_difference < 1e-5
    assert report.weights_match
    assert report.float_layers == []


def overflows(name, target):
    """True where activations of 8 bits multiplied together overflow on this processor."""
    return name == "matrix product" and target == "openvino" and adds_pairs_in_16_bits()


def drawn(generator):
    """The shape of a batch of images, drawn at random."""
    height, width = (2 * int(torch.randint(4, 8, (), generator=generator)) for _ in range(2))
    return (3, 3, height, width)


@pytest.mark.parametrize("target", FILES)
def test_rows_in_one_model_at_ties(target, tmp_path):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    for shape in (LINEAR, TOKENS, None):
        rows = {name: build() for name, (build, of) in ROWS.items() if of == shape and not overflows(name, target)}
        assert_equal_at_ties(SideBySide(rows), shape or drawn(generator), target, generator, tmp_path)


@pytest.mark.parametrize("target", FILES)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("seed", sweep(range(8)))
def test_every_row_at_ties(name, target, seed, tmp_path):
    if overflows(name, target):
        pytest.skip("activations of 8 bits multiplied together overflow on this processor")
    build, shape = ROWS[name]
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = drawn(generator)
    assert_equal_at_ties(build(), shape or images, target, generator, tmp_path)
