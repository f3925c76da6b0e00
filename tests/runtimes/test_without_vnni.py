"""Processors without VNNI: 8-bit weights saturate there, 7-bit ones do not. oneDNN can be told to be such a one."""

import pytest
import torch
from torch import nn

import halfeven as he
from processes import in_a_process
from sweeps import crossed


def verified(scheme, path):
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *layers).eval()
    x = torch.rand(4, 3, 16, 16)
    qmodel = he.calibrate(he.prepare(model, x, scheme=scheme), [x]).eval()
    return he.verify(qmodel, he.export(qmodel, path), [x], timed=False)


@pytest.mark.parametrize(
    ("isa", "scheme", "exact"), crossed(["AVX2", "AVX512_CORE"], [("w8a8", False), ("w7a8", True)])
)
def test_weights_of_7_bits_are_exact(isa, scheme, exact, tmp_path):
    report = in_a_process(verified, scheme, tmp_path / "model.xml", ONEDNN_MAX_CPU_ISA=isa)
    assert report.integer_layers == report.quantizable_layers == 4
    assert (report.integer_match == 1.0) is exact
    assert report.overflows is not exact
    assert ("this processor has no VNNI" in str(report)) is not exact
