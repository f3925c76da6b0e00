"""Integers that one wrong rounding changes: averages at ties, layers without a bias, and sums, on the real runtime."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.quantization.arithmetic import snap
from halfeven.quantization.model_quantizers import quantizers
from halfeven.runtimes.cpu import has_avx512_vnni
from halfeven.runtimes.openvino.exact_values import FakeQuantizeRange
from runtimes.parity import SCHEME, quantized
from sweeps import crossed, sweep


def conv(inputs=8, outputs=8, kernel=3, **options):
    return nn.Conv2d(inputs, outputs, kernel, **({"padding": kernel // 2} | options))


class Pools(nn.Module):
    """Every kind of average of one tensor, each read by a convolution."""

    def __init__(self, signed, padded=True):
        super().__init__()
        self.stem, self.signed = conv(3), signed
        pools = [nn.AvgPool2d(2), nn.AvgPool2d((3, 2), 2), nn.AvgPool2d(7, 3), nn.AdaptiveAvgPool2d(1)]
        pools += [nn.AdaptiveAvgPool2d((3, 2)), nn.AvgPool2d(3, 2, 1, count_include_pad=False)]
        self.pools = nn.ModuleList([*pools, nn.AvgPool2d(3, 2, 1)] if padded else pools)
        self.readers = nn.ModuleList(conv(8, 4, 1) for _ in range(len(self.pools) + 1))

    def forward(self, x):
        x = self.stem(x)
        x = x if self.signed else F.relu(x)
        averages = [pool(x) for pool in self.pools] + [x.mean((2, 3), keepdim=True)]
        return [read(average) for read, average in zip(self.readers, averages, strict=True)]


@pytest.mark.parametrize(
    ("ratio", "zero_point"),
    sweep(itertools.product([1.0, 0.5, 0.75, 0.6113], [0, 101, 128]), (0.5, 0), (1.0, 101)),
)
def test_averages_are_those_of_integers(ratio, zero_point, tmp_path):
    """With one scale before and after, every fourth average of 2x2 integers is a tie: half to even decides."""
    torch.manual_seed(zero_point)
    qmodel, batches = quantized(Pools(zero_point != 0, padded=zero_point != 101), (4, 3, 24, 18))
    found = {name: q for name, q in quantizers(qmodel).items() if not q.weight and name != "quantizers.x"}
    stem, *pools = found.values()
    for pool in pools:
        pool._store_range(stem.scale * ratio, torch.full_like(pool.zero_point, zero_point + stem.scheme.quant_min))
    stem.zero_point.fill_(zero_point + stem.scheme.quant_min)
    he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, tmp_path / "model.xml", batches, timed=False)
    assert report.integer_match == 1.0, report.first_difference
    assert sum(tensor.count for tensor in report.tensors) > 50_000

    exact = he.exact(qmodel)
    exact(batches[0])
    means = F.avg_pool2d(next(levels for name, levels in exact.codes.items() if name != "quantizers.x"), 2)
    assert int((means % 1 == 0.5).sum()) > 500, "no ties were made"


class Clipped(nn.Module):
    """Functions of tensors that have integers already: their other reader has them quantized before the clip."""

    def __init__(self, signed):
        super().__init__()
        self.stem, self.other = conv(3), conv(8, 4, 1)
        self.befores = nn.ModuleList([nn.Identity(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)])
        self.pools = nn.ModuleList([nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1, count_include_pad=False)])
        self.ceil = nn.AvgPool2d(2, ceil_mode=True)
        self.means = nn.ModuleList([nn.AdaptiveAvgPool2d(1)])
        self.readers = nn.ModuleList(conv(8, 2, 1) for _ in range(2 * len(self.befores) + 5 * 2 + 5 + 1 + 11))
        self.signed = signed

    def forward(self, x):
        x = self.stem(x)
        x = x if self.signed else F.relu(x)
        clips = [nn.Hardtanh(-0.23, 0.31), nn.ReLU6()]
        others = [nn.Identity(), nn.ReLU(), nn.LeakyReLU(0.1)]
        found = [clip(before(x) * 1.7) for before in self.befores for clip in clips]
        found += [act(pool(x)) for pool in (*self.pools, *self.means) for act in (*clips, *others)]
        found.append(self.ceil(x))
        # One average for each reader: where one reads bytes, all do.
        first, second, third, fourth = (F.avg_pool2d(x, kernel, 2) for kernel in ((3, 2), 3, 4, 5))
        found += [x.clamp(-0.4, 0.5).clamp(-0.23, 0.31), x.clamp(max=0.31), x.clamp(max=0.31).clamp(-0.2, 0.7)]
        found += [F.relu(x).clamp(max=0.31), F.relu(x.clamp(-0.2, 0.7)), F.relu6(x).clamp(-0.2, 0.7), -x]
        found += [-first, second * 2, (third * -1.3).clamp(-0.2, 0.25), fourth.clamp(-0.2, 0.25).clamp(-0.1, 0.15)]
        return self.other(x), [read(y) for read, y in zip(self.readers, found, strict=True)]


@pytest.mark.parametrize(
    ("scheme", "signed"),
    sweep(itertools.product(("w7a7", "w7a8"), (True, False)), ("w7a8", False)),
)
def test_clips_and_averages_of_integers_stop_at_bytes(scheme, signed, tmp_path):
    torch.manual_seed(0)
    qmodel, batches = quantized(Clipped(signed), (4, 3, 24, 24), scheme=scheme)
    batches = [2 * batch for batch in batches]
    he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, tmp_path / "model.xml", batches, timed=False)
    assert report.integer_match == 1.0, report.first_difference
    assert sum(tensor.count for tensor in report.tensors) > 50_000


class Streams(nn.Module):
    """Sums of integers and of tensors in float, as transformers have them before a LayerNorm."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))
        self.token = nn.Parameter(torch.randn(1, 1, 16) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(6))
        self.readers = nn.ModuleList(nn.Linear(16, 4) for _ in range(6))
        for layer in (self.first, self.second, self.third):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.normal_(layer.bias, std=0.01)

    def forward(self, x):
        y = self.first(x)
        z = self.second(y)
        parts = [
            torch.cat([self.token.expand(len(x), -1, -1), self.third(y)[:, 1:]], 1),
            F.gelu(z),
            z * torch.sigmoid(z),
            torch.tanh(z.mean(1, keepdim=True)),
            self.token.expand(len(x), x.shape[1], -1),
        ]
        sums = [part + y if index % 2 else y + part for index, part in enumerate(parts)]
        return [read(norm(total)) for total, norm, read in zip([*sums, x + y], self.norms, self.readers, strict=True)]


def test_a_layer_norm_reads_a_sum_in_units_of_its_integers(tmp_path):
    """Where the variance is small its epsilon shows in which units the runtime adds."""
    torch.manual_seed(0)
    qmodel, batches = quantized(Streams(), (64, 6, 16))
    batches = [batch * torch.logspace(-2, 0, 64).reshape(64, 1, 1) for batch in batches]
    he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, tmp_path / "model.xml", batches, timed=False)
    assert report.integer_match > 0.9999, report.first_difference


def without_bias(activation):
    layers = [conv(3, bias=False), activation, conv(kernel=1, bias=False), activation, conv(groups=8, bias=False)]
    return nn.Sequential(*layers, activation, conv(bias=False), activation, conv(8, 4, bias=False))


@pytest.mark.parametrize(
    ("activation", "per_channel"), crossed([nn.ReLU(), nn.Identity(), nn.ReLU6(), nn.Hardtanh(0, 0.2)], [True, False])
)
def test_layers_without_a_bias(activation, per_channel, tmp_path):
    """The scales of such a layer are merged into its quantizer's ends; a clip inside of these ends keeps them apart."""
    torch.manual_seed(0)
    qmodel, batches = quantized(without_bias(activation), (12, 3, 48, 48), per_channel=per_channel)
    he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, tmp_path / "model.xml", batches, timed=False)
    assert report.integer_match == 1.0, report.first_difference
    assert sum(tensor.count for tensor in report.tensors) > 2_000_000


def test_a_bias_of_zeros_is_none(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3), conv(), nn.ReLU(), conv(groups=8), conv(8, 4))
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.bias)
    qmodel, batches = quantized(model, (12, 3, 64, 64))
    he.export(qmodel, tmp_path / "model.xml")
    assert he.verify(qmodel, tmp_path / "model.xml", batches, timed=False).integer_match == 1.0


@pytest.mark.skipif(not has_avx512_vnni(), reason="the rule is that of processors with AVX512-VNNI")
def test_a_bias_that_all_outputs_share_moves_the_quantizer(tmp_path):
    """As timm initializes the layers of some attentions; one integer in 100,000 shows it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 576), nn.Linear(576, 4)).eval()
    nn.init.constant_(model[1].bias, 0.02)
    qmodel, batches = quantized(model, (80, 49, 96))
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.alone_match == 1.0, report.first_difference
    assert sum(tensor.count for tensor in report.tensors) > 2_000_000


def test_a_linear_layer_on_four_axes_is_scaled_by_an_operator_of_its_own(tmp_path):
    """As in attentions on windows; seven integers of two million show it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 576), nn.Linear(576, 4)).eval()
    qmodel, batches = quantized(model, (20, 4, 49, 96))
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.alone_match == 1.0, report.first_difference
    assert sum(tensor.count for tensor in report.tensors) > 2_000_000


class Sums(nn.Module):
    """Residual sums one after the other, each with its own scales."""

    def __init__(self, bias, kernel, signed, act, count=6):
        super().__init__()
        self.stem, self.signed, self.act = conv(3), signed, act
        self.branches = nn.ModuleList(conv(kernel=kernel, bias=bias) for _ in range(count))
        self.readers = nn.ModuleList(conv(8, 2, 1) for _ in range(count))

    def forward(self, x):
        x = self.stem(x)
        x = x if self.signed else F.relu(x)
        results = []
        for index, (branch, read) in enumerate(zip(self.branches, self.readers, strict=True)):
            y = x + branch(x) if index % 2 else branch(x) + x
            x = self.act(y)
            results.append(read(x))
        return torch.cat(results, 1)


SUMS = [(1, False, F.relu), (3, False, F.relu), (1, True, lambda x: x), (3, True, lambda x: x), (1, True, F.relu6)]


@pytest.mark.parametrize(
    ("kernel", "signed", "act", "bias"),
    sweep(((*of, bias) for of in SUMS for bias in (True, False)), *((*SUMS[i], i % 2 == 0) for i in (0, 3, 4))),
)
def test_sums_without_and_with_a_bias(kernel, signed, act, bias, tmp_path):
    torch.manual_seed(kernel)
    qmodel, batches = quantized(Sums(bias, kernel, signed, act), (8, 3, 48, 48))
    he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, tmp_path / "model.xml", batches, timed=False)
    assert report.integer_match == 1.0, report.first_difference
    assert sum(tensor.count for tensor in report.tensors) > 2_000_000


class Attention(nn.Module):
    """Four heads of 32 channels; the last layer hands on what they say."""

    def __init__(self, width=128):
        super().__init__()
        self.query, self.key, self.value, self.last = (nn.Linear(width, width) for _ in range(4))
        nn.init.eye_(self.last.weight)

    def forward(self, x):
        query, key, value = (
            layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        weights = (query @ key.transpose(-1, -2) * 32**-0.5).softmax(-1)
        return self.last((weights @ value).transpose(1, 2).flatten(2))


@pytest.mark.skipif(not has_avx512_vnni(), reason="OpenVINO runs an attention as one operator where AVX512-VNNI is")
@pytest.mark.parametrize("zero_point", [121, 126, 128])
def test_the_end_of_an_attention_rounds_as_it_does_for_users(zero_point, tmp_path):
    """Unwatched it is a product and a sum, watched one fused multiply-add: the outputs are those of the former. Of
    signed bytes (128) nothing is added before the rounding, in either."""
    torch.manual_seed(0)
    qmodel, batches = quantized(Attention(), (16, 48, 128))
    weights, value, end = (quantizers(qmodel)[f"quantizers.{name}"] for name in ("softmax", "value", "matmul_1"))
    unit = weights.scale * value.scale
    sums = torch.arange(-6000.0, 6000.0)

    def ties(ratio):
        limits = FakeQuantizeRange(
            -zero_point * unit * ratio, (255 - zero_point) * unit * ratio, 255, signed=zero_point == 128
        )
        limits = limits.moved(unit)
        return int((limits.codes(sums) != limits.in_kernel().codes_in_attention(sums)).sum())

    ratio = max((150 + 0.37 * step for step in range(200)), key=ties)
    assert ties(ratio) > 0
    end._store_range(unit * ratio, torch.full_like(end.zero_point, zero_point + end.scheme.quant_min))
    he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, tmp_path / "model.xml", batches, timed=False)
    assert report.integer_match == 1.0, report.first_difference
    assert report.output_difference == 0.0

    exact = he.exact(qmodel)
    used = exact(batches[0])
    exact.simulation.watched = True
    assert torch.equal(exact(batches[0]), used) == (zero_point == 128), "no tie was met"


class Scaled(nn.Module):
    """Halves of a tensor, one of which is multiplied by a number before the next layer reads it."""

    def __init__(self, layer, factor=0.177):
        super().__init__()
        self.both, self.first, self.second = layer(4, 16), layer(8, 4), layer(8, 4)
        self.factor = factor

    def forward(self, x):
        first, second = self.both(x).split(8, 1 if x.ndim == 4 else -1)
        return self.first(first * self.factor) + self.second(second)


SHAPES = {"signed": (nn.Linear, (4, 10, 4)), "unsigned": (conv, (4, 4, 12, 12))}


@pytest.mark.parametrize(
    ("times", "integers", "scheme"),
    crossed([0.99, 0.9925, 0.9937, 0.998, 1.0075, 1.0085], itertools.product(SHAPES, (SCHEME, "w7a7"))),
)
def test_a_quantizer_is_left_out_where_integers_lie_on_nearly_its_grid(times, integers, scheme, tmp_path):
    torch.manual_seed(0)
    layer, shape = SHAPES[integers]
    qmodel, batches = quantized(Scaled(layer), shape, scheme=scheme)
    found = {name.rpartition(".")[2]: quantizer for name, quantizer in quantizers(qmodel).items()}
    found["mul"]._store_range(found["both"].scale * 0.177 * times, found["both"].zero_point)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.integer_match == 1.0, (report.first_difference, report.max_lsb_difference)
    assert report.output_difference < 1e-5


@pytest.mark.parametrize("scheme", [SCHEME, "w7a7"])
def test_integers_times_a_negative_number(scheme, tmp_path):
    torch.manual_seed(0)
    qmodel, batches = quantized(Scaled(nn.Linear, -0.5), (8, 10, 4), scheme=scheme)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.integer_match == 1.0, (report.first_difference, report.max_lsb_difference)
    assert report.output_difference < 1e-5


class Branch(nn.Module):
    """A skip connection around a layer whose result is activated, and quantized, before it is added."""

    def __init__(self, act, kind=nn.Conv2d, *, depthwise=False, later=False):
        super().__init__()
        self.stem, self.wide = kind(3, 8, 3, padding=1), kind(8, 8, 3, padding=1, groups=1 if depthwise else 8)
        self.layer = kind(8, 8, 3, padding=1, groups=8 if depthwise else 1)
        self.act, self.last, self.later = act, nn.Linear(8, 4), later

    def forward(self, x):
        x = F.relu(self.stem(x))
        total = x + self.act(self.layer(F.relu(self.wide(x))))
        result = self.last(total.flatten(2).mean(2))
        return result + self.last(x.flatten(2).mean(2)) if self.later else result


BRANCHES = {
    "relu": lambda: Branch(F.relu),
    "relu6": lambda: Branch(F.relu6),
    "depthwise": lambda: Branch(F.relu, depthwise=True),
    "of sequences": lambda: Branch(F.relu, nn.Conv1d),
    "hardswish, which is rounded": lambda: Branch(F.hardswish),
    "leaky, which is rounded": lambda: Branch(F.leaky_relu),
    "in memory that is read later": lambda: Branch(F.relu, later=True),
}


@pytest.mark.parametrize(("name", "scheme"), crossed(BRANCHES, [SCHEME, "w7a7"]))
def test_a_quantizer_inside_a_convolutions_kernel_rounds_as_it_does_for_users(name, scheme, tmp_path):
    torch.manual_seed(0)
    shape = (8, 3, 20) if name == "of sequences" else (8, 3, 20, 20)
    qmodel, batches = quantized(BRANCHES[name](), shape, scheme=scheme)
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.integer_match == 1.0
    assert report.output_difference < 1e-5


def test_the_last_code_of_a_narrow_grid_passes_a_quantizer_that_is_repeated(tmp_path):
    """Behind an upsampling of free sizes. 15 scales divided by the scale are 14.999999 by way of its reciprocal."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(3), nn.ReLU(), nn.Upsample(scale_factor=2), conv()).eval()
    images = 4 * torch.randn(4, 3, 8, 8)
    qmodel = he.prepare(model, images, scheme="w4a4", dynamic_shapes={"input": {2: "height", 3: "width"}})
    he.calibrate(qmodel, [images])
    behind = quantizers(qmodel)["quantizers.1_relu"]
    scales = snap(torch.linspace(0.2, 0.3, 101))
    scale = scales[15 * scales * (1 / scales) < 15][0]
    behind._store_range(scale, torch.zeros_like(behind.zero_point))
    he.export(qmodel, tmp_path / "model.xml")
    report = he.verify(qmodel, tmp_path / "model.xml", [images], timed=False)
    assert report.integer_match == 1, report.first_difference
    exact = he.exact(qmodel)
    exact(images)
    assert max(codes.max() for name, codes in exact.codes.items() if "repeated" in name) == 15
