"""Parity on the real runtime: OpenVINO's integers equal the exact simulation's, for every row of the operator table."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.quantization.arithmetic import snap
from halfeven.quantization.model_quantizers import quantizers as he_quantizers
from halfeven.runtimes.cpu import adds_pairs_in_16_bits
from halfeven.runtimes.integer_layers import EXACT_IN_FLOAT32
from halfeven.runtimes.openvino.exact_values import FakeQuantizeRange
from runtimes.parity import SCHEME, SideBySide, deployed, quantized
from sweeps import crossed, sweep


class Function(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *x):
        return self.function(*x)


def conv(inputs=8, outputs=8, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, **({"padding": kernel // 2} | options))


def body(*middle, last=8):
    """A convolution and ReLU, what is to be tested, and a convolution that reads its integers."""
    return nn.Sequential(conv(3), nn.ReLU(), *middle, conv(last, 4))


def activated(activation):
    return nn.Sequential(conv(3), activation, conv(), activation, conv(8, 4))


ACTIVATIONS = (nn.Hardswish, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.ELU, nn.Mish, nn.LeakyReLU, nn.PReLU, nn.ReLU6)


class Residual(nn.Module):
    """A residual block: `order` is how the addition is written, `down` a convolution on the skip connection."""

    def __init__(self, order="skip last", down=False, act=F.relu, norm=True, signed=False):
        super().__init__()
        # On a processor with AVX2 alone OpenVINO computes 1x1 convolutions of 8 channels and stride 2 otherwise from
        # call to call.
        wide = 16 if down else 8
        self.stem, self.conv1 = conv(3, wide), conv(wide, wide, stride=2 if down else 1)
        self.conv2, self.norm = conv(wide, wide, bias=not norm), nn.BatchNorm2d(wide) if norm else nn.Identity()
        self.down = nn.Sequential(conv(wide, wide, 1, stride=2), nn.BatchNorm2d(wide)) if down else nn.Identity()
        self.last = conv(wide, 4)
        self.order, self.act, self.signed = order, act, signed

    def forward(self, x):
        x = self.stem(x) if self.signed else F.relu(self.stem(x))
        y = self.norm(self.conv2(F.relu(self.conv1(x))))
        skip = self.down(x)
        y = skip + y if self.order == "skip first" else y + skip
        return self.last(self.act(y))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.last = conv(3), conv(), conv(8, 4, 1), conv(20, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.last(torch.cat([F.relu(self.a(x)), x, self.b(x)], 1))


class Excite(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, gate=torch.sigmoid):
        super().__init__()
        self.stem, self.reduce, self.expand, self.last = conv(3), conv(8, 4, 1), conv(4, 8, 1), conv(8, 4)
        self.gate = gate

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = x.mean((2, 3), keepdim=True)
        return self.last(x * self.gate(self.expand(F.relu(self.reduce(y)))))


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3), conv(4, 4), conv(4, 4)

    def forward(self, x):
        a, b = F.relu(self.stem(x)).chunk(2, 1)
        return torch.cat([self.a(a), self.b(b)], 1)


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Features(nn.Module):
    """Returns what it also reads."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = conv(3), conv()

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.last(x), x


class Dense(nn.Module):
    """Concatenations of concatenations, as in DenseNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = conv(3), conv(8, 4), conv(12, 4), conv(16, 4)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.a(F.relu(x))], 1)
        x = torch.cat([x, self.b(F.relu(x))], 1)
        return self.c(F.relu(self.norm(x)))


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv, self.last = conv(3), conv(), conv(8, 4)

    def forward(self, x):
        x = F.relu(self.conv(F.relu(self.stem(x))))
        return self.last(F.relu(self.conv(x)))


IMAGE = (4, 3, 10, 10)


class ReadTwice(nn.Module):
    """A convolution without a bias whose result a quantizer reads, and something that computes in float."""

    def __init__(self, one, bias=False):
        super().__init__()
        self.stem, self.conv, self.last = conv(3), conv(bias=bias), conv(8, 4, 1)
        self.norm, self.scale, self.one = nn.GroupNorm(1, 8), nn.Parameter(torch.ones(8, 1, 1)), one

    def forward(self, x):
        x = self.conv(F.relu(self.stem(x)))
        y = x * self.scale if self.one == "scaled by ones" else F.relu(x)
        return self.last(y + self.norm(x))


class PoolMixer(nn.Module):
    """An average less what it is of: PoolFormer's."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.last = conv(3), nn.GroupNorm(1, 8), conv(8, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(x)
        return self.last(x + F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y)


class MeetsSum(nn.Module):
    """An average added to the sum of a skip connection and a convolution: NASNet's."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch, self.last = conv(3), conv(), conv(8, 4, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.last(F.relu(F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) + (x + self.branch(x))))


class Averaged(nn.Module):
    """A sequence's average that a BatchNorm reads: LeViT's head, NextViT's attention."""

    def __init__(self, average):
        super().__init__()
        self.stem, self.average, self.norm, self.last = nn.Conv1d(8, 8, 1), average, nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.average(F.relu(self.stem(x))))
        return self.last(x.transpose(1, -1) if x.ndim == 3 else x)


class Transition(nn.Module):
    """An average that a BatchNorm reads behind other operators: DenseNet's."""

    def __init__(self, readers):
        super().__init__()
        self.readers = readers
        self.stem, self.pre, self.other = conv(3), conv(8, 8, 1, bias=False), conv(8, 8, stride=2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (8, 8, 16))
        self.lasts = nn.ModuleList(conv(width, 4, 1) for width in (8, 8, 16))

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = F.avg_pool2d(self.pre(x), 2, 2)
        if self.readers == "two":
            return [last(F.relu(norm(y))) for norm, last in zip(self.norms[:2], self.lasts[:2], strict=True)]
        if self.readers == "max pool":
            y = F.max_pool2d(y, 2, 2)
        if self.readers == "concat":
            y = torch.cat([y, self.other(x)], 1)
        wide = y.shape[1] == 16
        return self.lasts[2 if wide else 0](F.relu(self.norms[2 if wide else 0](y)))


class Scaled(nn.Module):
    """A residual branch that a number scales: Inception-ResNet's."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = conv(), conv(8, 8, 1)

    def forward(self, x):
        return F.relu(x + 0.2 * self.outer(F.relu(self.inner(x))))


class Levels(nn.Module):
    """A head that two levels of a pyramid share, with statistics for each: EfficientDet's."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.last = conv(3), conv(bias=False), conv(8, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x):
        x = F.relu(self.stem(x))
        return [
            self.last(F.relu6(norm(self.shared(level))))
            for norm, level in zip(self.norms, (x, F.max_pool2d(x, 2)), strict=True)
        ]


class StackedSum(nn.Module):
    """Feature maps that are added by stacking them, one of them in two sums: EfficientDet's pyramid."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b = conv(3), conv(), conv()
        self.heads = nn.ModuleList(conv(8, 4) for _ in range(2))

    def forward(self, x):
        x = F.relu(self.stem(x))
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        one = F.relu(torch.stack([x, a], dim=-1).sum(-1))
        return self.heads[0](one) + self.heads[1](F.relu(torch.stack([a, b, one], dim=-1).sum(-1)))


MODELS = {
    # name: (model, input shape)
    "conv": (lambda: body(), IMAGE),
    "conv, batch norm": (lambda: nn.Sequential(conv(3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), conv()), IMAGE),
    "conv, batch norm, no activation": (lambda: nn.Sequential(conv(3), nn.BatchNorm2d(8), conv(), conv()), IMAGE),
    "strided": (lambda: body(conv(stride=2), nn.ReLU()), IMAGE),
    "dilated": (lambda: body(conv(dilation=2, padding=2), nn.ReLU()), IMAGE),
    "depthwise": (lambda: body(conv(groups=8), nn.ReLU()), IMAGE),
    "depthwise, batch norm, relu6": (lambda: body(conv(groups=8), nn.BatchNorm2d(8), nn.ReLU6()), IMAGE),
    "grouped": (lambda: body(conv(groups=2), nn.ReLU()), IMAGE),
    "1x1": (lambda: body(conv(8, 8, 1), nn.ReLU()), IMAGE),
    "5x5": (lambda: body(conv(8, 8, 5), nn.ReLU()), IMAGE),
    "conv1d": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 1)
        ),
        (4, 3, 20),
    ),
    "conv3d": (
        lambda: nn.Sequential(
            nn.Conv3d(32, 32, 3, padding=1), nn.ReLU(), nn.Conv3d(32, 32, 3), nn.ReLU(), nn.Conv3d(32, 4, 1)
        ),
        (2, 32, 4, 4, 4),
    ),
    "transposed": (lambda: body(nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU()), IMAGE),
    "transposed, signed input": (
        lambda: nn.Sequential(conv(3), nn.ConvTranspose2d(8, 8, 3, 2, 1, 1), nn.ReLU(), conv()),
        IMAGE,
    ),
    "linear": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)),
        (8, 16),
    ),
    "linear, 3-D": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)),
        (4, 5, 16),
    ),
    "linear, batch norm": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)),
        (8, 16),
    ),
    "linear without activation": (
        lambda: nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)),
        (8, 16),
    ),
    "relu6": (lambda: activated(nn.ReLU6()), IMAGE),
    "silu": (lambda: activated(nn.SiLU()), IMAGE),
    "hardswish": (lambda: activated(nn.Hardswish()), IMAGE),
    "gelu": (lambda: activated(nn.GELU()), IMAGE),
    "sigmoid": (lambda: activated(nn.Sigmoid()), IMAGE),
    "hardsigmoid": (lambda: activated(nn.Hardsigmoid()), IMAGE),
    "tanh": (lambda: activated(nn.Tanh()), IMAGE),
    "elu": (lambda: activated(nn.ELU()), IMAGE),
    "mish": (lambda: activated(nn.Mish()), IMAGE),
    "leaky": (lambda: activated(nn.LeakyReLU(0.1)), IMAGE),
    "prelu": (lambda: activated(nn.PReLU(8)), IMAGE),
    "activations": (
        lambda: nn.Sequential(conv(3), *itertools.chain(*((activation(), conv()) for activation in ACTIVATIONS))),
        IMAGE,
    ),
    "no activation": (lambda: nn.Sequential(conv(3), conv(), conv()), IMAGE),
    "residual": (lambda: Residual(), IMAGE),
    "residual, skip first": (lambda: Residual("skip first"), IMAGE),
    "residual, downsampled": (lambda: Residual(down=True), IMAGE),
    "residual, downsampled, skip first": (lambda: Residual("skip first", down=True), IMAGE),
    "residual, no batch norm": (lambda: Residual(norm=False), IMAGE),
    "residual, no activation": (lambda: Residual(act=lambda x: x), IMAGE),
    "residual, silu": (lambda: Residual(act=F.silu), IMAGE),
    "residual, signed": (lambda: Residual(signed=True), IMAGE),
    "residual, signed, no activation": (lambda: Residual(act=lambda x: x, signed=True), IMAGE),
    "concat": (lambda: Concat(), IMAGE),
    "split": (lambda: Split(), IMAGE),
    "max pool": (lambda: body(nn.MaxPool2d(3, 2, 1)), IMAGE),
    "layer scale": (
        lambda: nn.Sequential(
            conv(3), nn.ReLU(), conv(), Function(lambda x: x * torch.arange(1, 9)[:, None, None]), conv()
        ),
        IMAGE,
    ),
    **{
        f"{name}, clip": (lambda function=function: body(nn.MaxPool2d(2), Function(function)), IMAGE)
        for name, function in {
            "factor of each channel": lambda x: F.relu6(4 * (x * torch.linspace(0.5, 1.5, 8)[:, None, None])),
            "term of each channel": lambda x: (x + torch.linspace(-1, 1, 8)[:, None, None]).clamp(-0.1, 0.5),
            "factor of each channel, two": lambda x: F.hardtanh(x / torch.arange(1, 9)[:, None, None], 0, 0.2).clamp(
                0, 9
            ),
        }.items()
    },
    "scaled by a number, residual": (
        lambda: nn.Sequential(conv(3), nn.ReLU(), Scaled(), conv()),
        IMAGE,
    ),
    "relu before batch norm": (
        lambda: nn.Sequential(conv(3), nn.ReLU(), nn.BatchNorm2d(8), conv(), nn.ReLU(), nn.BatchNorm2d(8), conv()),
        IMAGE,
    ),
    **{
        f"conv without bias, read twice: {one}": (lambda one=one: ReadTwice(one), IMAGE)
        for one in ("relu", "scaled by ones")
    },
    "average pool less itself": (PoolMixer, IMAGE),
    "average pool and a sum": (MeetsSum, IMAGE),
    "average pool and itself": (
        lambda: nn.Sequential(conv(3), nn.AvgPool2d(2), Function(lambda x: x + x), nn.ReLU(), conv()),
        IMAGE,
    ),
    **{
        f"average pool, batch norm: {readers}": (lambda readers=readers: Transition(readers), IMAGE)
        for readers in ("one", "two", "max pool", "concat")
    },
    **{
        f"{name} of a sequence, batch norm": (lambda average=average: Averaged(average), (4, 8, 64))
        for name, average in {
            "average pool": nn.AvgPool1d(4),
            "global average pool": nn.AdaptiveAvgPool1d(1),
            "mean": Function(lambda x: x.mean(2, keepdim=True)),
            "mean without its axis": Function(lambda x: x.mean(2)),
        }.items()
    },
    "shared by two batch norms": (Levels, IMAGE),
    "stacked sums": (StackedSum, IMAGE),
    "max pool, rounded up": (lambda: body(nn.MaxPool2d(3, 2, ceil_mode=True)), IMAGE),
    "average pool": (lambda: body(nn.AvgPool2d(2)), IMAGE),
    "average pool, padded": (lambda: body(nn.AvgPool2d(3, 2, 1)), IMAGE),
    "average pool, padded, not counted": (lambda: body(nn.AvgPool2d(3, 2, 1, count_include_pad=False)), IMAGE),
    "average pool, padded, signed": (lambda: nn.Sequential(conv(3), nn.AvgPool2d(3, 2, 1), conv()), IMAGE),
    "average pool, signed": (lambda: nn.Sequential(conv(3), nn.AvgPool2d(2), conv()), IMAGE),
    "global average pool": (
        lambda: nn.Sequential(conv(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        IMAGE,
    ),
    "mean": (lambda: nn.Sequential(conv(3), nn.ReLU(), Function(lambda x: x.mean((2, 3))), nn.Linear(8, 4)), IMAGE),
    "pad": (lambda: body(nn.ZeroPad2d(1)), IMAGE),
    "reflection pad": (lambda: body(nn.ReflectionPad2d(1)), IMAGE),
    "rolled": (lambda: body(Function(lambda x: x.roll((1, -2), (2, 3)))), IMAGE),
    "repeated": (lambda: body(Function(lambda x: x.repeat(1, 1, 2, 1))), IMAGE),
    "nearest": (lambda: body(nn.Upsample(scale_factor=2)), IMAGE),
    "bilinear": (lambda: body(nn.Upsample(scale_factor=2, mode="bilinear")), IMAGE),
    "bilinear, corners aligned": (lambda: body(nn.UpsamplingBilinear2d(size=(19, 17))), IMAGE),
    "pixel shuffle": (lambda: body(nn.PixelShuffle(2), last=2), IMAGE),
    "squeeze and excitation": (lambda: Excite(), IMAGE),
    "squeeze and excitation, hard": (lambda: Excite(F.hardsigmoid), IMAGE),
    "multiplication": (lambda: body(Function(lambda x: x * x.flip(1))), IMAGE),
    "attention": (lambda: Block(), (4, 6, 16)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)), (4, 6, 16)),
    "group norm": (lambda: body(nn.GroupNorm(2, 8), nn.ReLU()), IMAGE),
    "reused layer": (lambda: Reused(), IMAGE),
    "returned tensor": (lambda: Features(), IMAGE),
    "concat of concats": (lambda: Dense(), IMAGE),
}

NOT_EXACT = {"relu before batch norm", "stacked sums", "average pool less itself"}
"""One in a million: the plugin merges a BatchNorm with the quantizer behind it; a chain of sums is taken in units of
its last operand."""

if adds_pairs_in_16_bits():
    NOT_EXACT.add("average pool and a sum")  # a chain of sums, exact with VNNI

AT_TIES = {
    *("conv", "strided", "dilated", "depthwise", "linear", "linear, 3-D", "residual", "concat", "split", "max pool"),
    *("residual, signed, no activation", "average pool, signed", "mean", "nearest", "multiplication"),
    "squeeze and excitation, hard",
}
"""Rows that `test_rows_at_ties` has, on both runtimes."""
TOGETHER = {
    *("hardswish", "sigmoid", "hardsigmoid", "tanh", "elu", "mish", "leaky", "prelu", "relu6"),  # in "activations"
    *("gelu", "silu", "layer norm"),  # in `test_float_operators`
}
RELATIVES = {
    *("1x1", "5x5", "residual, no batch norm", "residual, skip first", "linear without activation"),
    *("bilinear, corners aligned", "conv without bias, read twice: scaled by ones", "average pool, batch norm: one"),
    *("average pool, batch norm: max pool", "average pool of a sequence, batch norm"),
    *("global average pool of a sequence, batch norm", "mean without its axis of a sequence, batch norm"),
}
"""Rows that differ little from another one."""
ON_MORE_DATA = {
    *("conv, batch norm, no activation", "depthwise, batch norm, relu6", "no activation"),  # in this file
    *("residual, signed", "residual, no activation", "average pool", "average pool, padded"),  # in `test_ties`
    *("average pool, padded, not counted", "average pool, padded, signed", "global average pool"),
}
"""Rows whose like is tested on OpenVINO with a hundred times as many integers."""

AS_ONNX = (
    *(
        "conv, batch norm",
        "depthwise, batch norm, relu6",
        "transposed",
        "transposed, signed input",
        "linear",
        "linear, 3-D",
    ),
    *("residual, downsampled", "residual, signed", "concat", "split", "average pool, padded, signed", "mean"),
    *("squeeze and excitation", "attention", "reused layer", "returned tensor", "nearest"),
)


def in_float(name):
    """How many layers of a row have no integer kernel: transposed convolutions on a processor without VNNI."""
    return int(name.startswith("transposed") and adds_pairs_in_16_bits())


def assert_parity(report, exact=True, simulated=0.99, in_float=0):
    assert report.weights_match
    assert len(report.float_layers) == in_float
    assert report.integer_layers == report.quantizable_layers - in_float > 0
    assert sum(tensor.count for tensor in report.tensors) > 500
    if exact:
        assert report.integer_match == 1.0, report.first_difference
        assert report.max_lsb_difference == 0
        assert report.first_difference == ""
        assert report.output_difference < 1e-5, "unwatched the file computes something else"
    else:
        assert report.integer_match >= 0.9995
        assert report.max_lsb_difference <= 1
    assert report.float_simulation_match >= simulated
    assert report.top1_agreement == 1.0


def side_by_side(names):
    """The rows among these that have one input, as one model each: (names, model, shape)."""
    of_shape = {}
    for name in sorted(names):
        of_shape.setdefault(MODELS[name][1], []).append(name)
    return [
        (group, SideBySide({name: MODELS[name][0]() for name in group}), shape) for shape, group in of_shape.items()
    ]


ALONE = {*NOT_EXACT, "transposed", "transposed, signed input"}
"""Rows that are no part of a larger model: not all of their layers run in integers, or not all of these are equal."""
IN_ONE_MODEL = MODELS.keys() - AT_TIES - TOGETHER - RELATIVES - ON_MORE_DATA - ALONE


def test_rows_in_one_model(tmp_path):
    for names, model, shape in side_by_side(IN_ONE_MODEL):
        report = deployed(model, shape, tmp_path / "model.xml")
        assert_parity(report)
        assert report.integer_layers >= 2 * len(names)


@pytest.mark.parametrize("name", sweep(sorted(MODELS), *ALONE))
def test_integers_equal_in_openvinos_own_format(name, tmp_path):
    build, shape = MODELS[name]
    report = deployed(build(), shape, tmp_path / "model.xml")
    assert_parity(report, exact=name not in NOT_EXACT, in_float=in_float(name))


@pytest.mark.parametrize(
    "name",
    sweep(
        AS_ONNX,
        *("transposed, signed input", "linear, 3-D", "average pool, padded, signed", "attention"),
    ),
)
def test_integers_equal_in_onnx_files_read_by_openvino(name, tmp_path):
    build, shape = MODELS[name]
    report = deployed(build(), shape, tmp_path / "model.onnx")
    assert_parity(report, exact=name not in NOT_EXACT, in_float=in_float(name))


@pytest.mark.parametrize(
    "options", [{"signed": True}, {"signed": True, "down": True}, {"act": lambda x: x, "signed": True}]
)
def test_fused_sums_on_more_data(options, tmp_path):
    """A skip connection with an odd zero point shows one wrong integer in fifty thousand; small batches hide it."""
    report = deployed(Residual(**options), (8, 3, 40, 40), tmp_path / "model.xml")
    assert_parity(report)
    assert sum(tensor.count for tensor in report.tensors) > 600_000


SUMS = {
    # a sum kept as signed bytes, which no convolution reads
    "signed": lambda net, x: net.last((net.first(x) + x).flatten(2).transpose(1, 2)),
    "signed, leaky relu": lambda net, x: net.last(F.leaky_relu(net.first(x) + x, 0.3).flatten(2).transpose(1, 2)),
    # sums of two tensors of integers
    "of integers": lambda net, x: net.second(net.first(x) + net.other(x) + x),
    "of integers, pooled": lambda net, x: net.second(F.max_pool2d(net.first(x) + net.other(x), 3, 1, 1) + x),
    "of integers, second pooled": lambda net, x: net.second(x + F.max_pool2d(net.first(x) + net.other(x), 3, 1, 1)),
}


class Summed(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.stem, self.first, self.other = conv(3, 16, 1), conv(16, 16), conv(16, 16, 1)
        self.second, self.last = conv(16, 4), nn.Linear(16, 4)
        self.function = function

    def forward(self, x):
        return self.function(self, self.stem(x))


@pytest.mark.parametrize(
    ("seed", "name"),
    sweep(itertools.product(range(4), SUMS), (0, "signed, leaky relu"), (0, "of integers"), (0, "of integers, pooled")),
)
def test_sums_on_more_data(seed, name, tmp_path):
    """One rounding at another place changes one integer in a hundred thousand, and in some grids alone."""
    torch.manual_seed(seed)
    qmodel, batches = quantized(Summed(SUMS[name]), (12, 3, 48, 48))
    if name.startswith("signed"):
        grid = [q for q in he_quantizers(qmodel).values() if not q.weight][-1]
        grid._store_range(grid.scale, torch.tensor(128 + grid.scheme.quant_min))
    path = he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.alone_match == 1.0, report.first_difference


@pytest.mark.parametrize("name", ["conv, batch norm, no activation", "depthwise, batch norm, relu6", "no activation"])
def test_layers_on_more_data(name, tmp_path):
    """One wrong rounding of a scale changes one integer in a hundred thousand."""
    report = deployed(MODELS[name][0](), (12, 3, 64, 64), tmp_path / "model.xml")
    assert_parity(report)
    assert sum(tensor.count for tensor in report.tensors) > 2_000_000


class Branches(nn.Module):
    """Many tensors, each with its own scale and zero point, with and without ReLU."""

    def __init__(self, count=16):
        super().__init__()
        self.stem = conv(3)
        self.wide = nn.ModuleList(conv(8, 8, 1) for _ in range(count))
        self.narrow = nn.ModuleList(conv(8, 2, 1) for _ in range(count))

    def forward(self, x):
        x = self.stem(x)
        results = []
        for index, (wide, narrow) in enumerate(zip(self.wide, self.narrow, strict=True)):
            y = wide(x) * 1.0 if index % 4 == 3 else wide(x)  # every fourth is quantized on its own, not by the kernel
            results.append(narrow(F.relu(y) if index % 2 else y))
        return torch.cat(results, 1)


def test_integers_equal_at_many_scales(tmp_path):
    """Whether a kernel multiplies by a reciprocal, and whether it rounds a zero point, shows at some scales only."""
    report = deployed(Branches(), (12, 3, 64, 64), tmp_path / "model.xml")
    assert_parity(report)
    assert sum(tensor.count for tensor in report.tensors) > 20_000_000


def test_a_zero_point_survives_its_ends():
    """The level of zero is an integer, though float32's quotient of the ends is not always one."""
    scales = snap(torch.logspace(-6, 3, 400))
    quotients = []
    for scale in scales:
        low, high = -121 * scale, 134 * scale
        limits = FakeQuantizeRange(low, high, 255)
        assert limits.zero_code == 121
        assert limits.codes(torch.zeros(1)) == 121
        quotients.append((-low * 255) / (high - low))  # which a fused sum takes as it is
    assert any(quotient != 121 for quotient in quotients)


def test_sums_beyond_float32s_integers(tmp_path):
    model = nn.Sequential(nn.Linear(5000, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.uniform_(0.5, 1.0)
    qmodel = he.calibrate(he.prepare(model, torch.rand(4, 5000), scheme=SCHEME), [torch.rand(4, 5000)]).eval()
    he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, tmp_path / "model.xml", [torch.rand(8, 5000) for _ in range(3)], timed=False)
    levels = 5000 * 127 * 63 * 0.7  # about what one sum amounts to
    assert levels > EXACT_IN_FLOAT32
    assert report.integer_match == 1.0
    assert report.integer_layers == 2


def test_ties_fall_as_in_the_runtime(tmp_path):
    """Values that land half-way: the zero point is added before rounding, so that odd ones turn ties over."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(127 / 128)
        model[1].weight.fill_(1.0)
    qmodel = he.prepare(model, torch.randn(2, 1, 8, 8), weight_observer="mse")
    steps = {"0.weight": 1 / 128, "1.weight": 1 / 127, "input": 1 / 16, "0": 127 / 512}
    for name, quantizer in he_quantizers(qmodel).items():
        key = name.replace("_quantizer", "").replace("quantizers.", "")
        quantizer._store_range(torch.full_like(quantizer.scale, steps[key]), torch.full_like(quantizer.zero_point, 0))
        if not quantizer.weight:
            quantizer.zero_point.fill_(101)
    qmodel.eval()
    he.export(qmodel, tmp_path / "model.xml")
    x = torch.arange(-64, 64).float().reshape(2, 1, 8, 8) / 16
    report = he.verify(qmodel, tmp_path / "model.xml", [x], timed=False)
    assert report.integer_match == 1.0
    assert report.float_simulation_match < 0.95, "no ties were made"


OUTPUTS = {
    "linear": (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 7)), (4, 8)),
    "linear, tokens, sigmoid": (nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 7), nn.Sigmoid()), (4, 5, 8)),
    "pool": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1)), (4, 3, 8, 8)),
    "convolution": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)), (4, 3, 8, 8)),
}


@pytest.mark.parametrize(
    ("name", "ending", "scheme"), crossed(sorted(OUTPUTS), itertools.product(["xml", "onnx"], [SCHEME, "w4a4"]))
)
def test_integers_of_quantized_outputs_equal(name, ending, scheme, tmp_path):
    model, shape = OUTPUTS[name]
    options = {"quantize_outputs": True, "activation_observer": "mse", "scheme": scheme}
    report = deployed(model, shape, tmp_path / f"model.{ending}", **options)
    assert report.integer_match == report.last_integer_match == 1.0
    assert report.integer_layers == report.quantizable_layers == 2
    assert len(report.tensors) == 3 + (name == "pool")


@pytest.mark.parametrize("leave_out", [("last",), ("stem", "last")])
def test_a_model_of_several_regions(leave_out, tmp_path):
    report = deployed(Residual(), IMAGE, tmp_path / "model.xml", leave_out=leave_out)
    assert report.weights_match
    assert report.integer_match == 1.0
    assert report.quantizable_layers == 4 - len(leave_out)


def test_the_exact_simulation_keeps_structured_outputs():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = conv(3), conv()

        def forward(self, x):
            x = F.relu(self.stem(x))
            return {"logits": self.last(x), "more": [x]}

    qmodel, (x, *_) = quantized(Heads(), IMAGE)
    expected = qmodel(x)
    found = he.exact(qmodel)(x)
    assert set(found) == {"logits", "more"}
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0.02, atol=0.02)
