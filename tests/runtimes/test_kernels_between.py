"""Parity where OpenVINO fuses elementwise operators into kernels: sums, gates, normalizations, layer scales."""

import openvino
import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.quantization.model_quantizers import quantizers
from halfeven.runtimes.openvino import exact, kernels_between
from runtimes.parity import SCHEME, quantized, trained
from runtimes.test_exact import conv


class LayerScale(nn.Module):
    """ConvNeXt's block: a LayerNorm over channels, and a scale for each channel before the sum."""

    def __init__(self):
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 16, 2, 2), conv(16, 4)
        self.depthwise, self.norm = conv(16, 16, 7, groups=16), nn.LayerNorm(16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = nn.Parameter(0.1 + 0.4 * torch.rand(16, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.narrow(F.gelu(self.wide(y))).permute(0, 3, 1, 2)
        return self.last(x + y * self.scale)


class ScaledPool(nn.Module):
    """PoolFormer's block: a difference of an average and a tensor, scaled, and a sum of it."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.last, self.norm = conv(3), conv(), conv(8, 4), nn.BatchNorm2d(8)
        self.scale = nn.Parameter(0.1 + 0.4 * torch.rand(8, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(x)
        x = x + self.scale * (F.avg_pool2d(y, 3, 1, 1, count_include_pad=False) - y)
        return self.last(x + self.scale * F.gelu(self.middle(x)))


@pytest.mark.parametrize(("build", "seed"), [(LayerScale, 3), (ScaledPool, 0)])
def test_a_fused_kernel_rounds_as_it_does_in_the_file(build, seed, tmp_path):
    """By the formulas alone, three and eight of a million integers differ, and outputs by a step."""
    torch.manual_seed(seed)
    model = trained(build())
    x = torch.randn(128, 3, 16, 16)
    qmodel = he.calibrate(he.prepare(model, x, scheme=SCHEME), [x]).eval()
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), [x], timed=False)
    assert report.integer_match == 1, report
    assert report.output_difference == 0, report


class TinyScale(nn.Module):
    """A block whose layer scale is as small as at its initialization, behind a permutation."""

    def __init__(self, scale):
        super().__init__()
        self.stem, self.last, self.wide, self.narrow = conv(3), conv(8, 4), nn.Linear(8, 16), nn.Linear(16, 8)
        self.scale = nn.Parameter(torch.full((8,), scale))

    def forward(self, x):
        x = self.stem(x)
        y = self.narrow(F.gelu(self.wide(x.permute(0, 2, 3, 1)))) * self.scale
        return self.last(x + y.permute(0, 3, 1, 2))


@pytest.mark.parametrize("scale", [1e-6, 1e-3])
def test_the_zero_point_of_a_tiny_tensor_is_lost_as_in_the_file(scale, tmp_path):
    """OpenVINO takes a lower limit above -1e-6 for 0: it keeps the bytes, and forgets the zero point."""
    torch.manual_seed(0)
    qmodel, batches = quantized(TinyScale(scale), (4, 3, 8, 8))
    assert {int(q.zero_point) for q in quantizers(qmodel).values() if not q.weight} - {0, 128}
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), batches, timed=False)
    assert report.integer_match == 1, report


class PreActivation(nn.Module):
    """Two residual sums in kernels of convolutions, of which a BatchNorm reads the second."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.last = conv(3), nn.BatchNorm2d(8), conv(8, 4)
        self.layers = nn.ModuleList(conv() for _ in range(4))

    def forward(self, x):
        a, b, c, d = self.layers
        x = self.stem(x).relu()
        x = x + b(a(x).relu())
        x = x + d(c(x).relu())
        return self.last(self.norm(x).relu())


def test_a_part_of_the_file_goes_past_the_marks_of_sums(tmp_path, monkeypatch):
    """A tensor that is an output of the part, and of no file, would keep its readers out of the kernel."""
    torch.manual_seed(0)
    qmodel, (x, *_) = quantized(PreActivation(), (4, 3, 8, 8))
    path = he.export(qmodel, tmp_path / "model.xml")
    kinds = [node.get_type_name() for node in openvino.Core().read_model(path).get_ordered_ops()]
    activations = [quantizer for quantizer in quantizers(qmodel).values() if not quantizer.weight]
    assert kinds.count("FakeQuantize") > len(activations)
    monkeypatch.setattr(exact, "NEAR_A_TIE", 1.0)  # all tensors are rounded by the kernels
    parts = []
    cut_out = kernels_between._cut_out
    monkeypatch.setattr(kernels_between, "_cut_out", lambda *args: parts.append(cut_out(*args)) or parts[-1])
    he.exact(qmodel)(x)
    outputs = [port.get_node().input_value(0).get_node().get_type_name() for part in parts for port in part.outputs]
    assert set(outputs) == {"FakeQuantize"}


def test_a_part_that_the_plugin_computes_otherwise_than_within_the_file_is_not_asked(tmp_path):
    """Shifted windows: alone, the product of scaled queries and keys of one split reads other bytes (2026.4)."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 56, 56)
    sizes = {"img_size": 56, "patch_size": 4, "window_size": 7, "embed_dim": 32, "depths": (2,), "num_heads": (2,)}
    model = SwinTransformer(**sizes, num_classes=10).eval()
    qmodel = he.calibrate(he.prepare(model, x, scheme=SCHEME), [x, torch.randn(4, 3, 56, 56)])
    report = he.verify(qmodel, he.export(qmodel, tmp_path / "model.xml"), [x], timed=False)
    assert report.alone_match == 1, report.first_difference
