"""Rotary embeddings of complex numbers in both runtimes, and Fourier transforms, which OpenVINO's file cannot have."""

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import ExportError
from runtimes.parity import SCHEME


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        angles = torch.outer(torch.arange(16.0), 10000 ** -torch.linspace(0, 1, 4))
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def rotated(self, x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.turns[: x.shape[1]]).flatten(2)

    def forward(self, x):
        scores = self.rotated(self.query(x)) @ self.rotated(self.key(x)).transpose(1, 2)
        return self.out(scores.softmax(-1) @ x)


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_rotary_embeddings_of_complex_numbers_are_equal_at_all_lengths(target, tmp_path):
    batches = [torch.randn(2, length, 8) for length in (6, 11)]
    options = {"target": target, "scheme": SCHEME, "dynamic_shapes": {"x": {1: "tokens"}}}
    qmodel = he.quantize(Attention().eval(), batches, **options)
    path = he.export(qmodel, tmp_path / ("m.xml" if target == "openvino" else "m.onnx"))
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.integer_match == 1
    assert report.output_difference < 1e-6
    assert "on complex numbers are written out" in str(he.plan_of(qmodel))


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.out = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        y = self.mix(x)
        return self.out(torch.fft.irfft2(torch.fft.rfft2(y) * 2, s=y.shape[-2:]))


def test_a_fourier_transform_is_named_with_what_to_do(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    qmodel = he.calibrate(he.prepare(Spectral().eval(), x, scheme=SCHEME), [x])
    with pytest.raises(ExportError, match=r"complex numbers \(fft_rfft2, .*target=\"onnxruntime\""):
        he.export(qmodel, tmp_path / "m.xml")
