"""Pooling over segments in both runtimes, as graph networks have it."""

import pytest
import torch
from torch import nn

import halfeven as he
from runtimes.parity import SCHEME


class Messages(nn.Module):
    """Adds the messages of the neighbours to each node, and averages the nodes of each graph."""

    def __init__(self):
        super().__init__()
        self.fc, self.message, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x, edges, graphs):
        h = self.fc(x).relu()
        h = (h + torch.zeros_like(h).index_add_(0, edges[1], self.message(h[edges[0]]))).relu()
        index = graphs[:, None].expand_as(h)
        return self.out(torch.zeros(3, 16).scatter_reduce(0, index, h, "mean", include_self=False))


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_segments_are_equal(target, tmp_path):
    batch = (torch.randn(20, 8), torch.randint(20, (2, 40)), torch.arange(20) // 7)
    qmodel = he.calibrate(he.prepare(Messages().eval(), batch, target=target, scheme=SCHEME), [batch])
    path = he.export(qmodel.eval(), tmp_path / ("m.xml" if target == "openvino" else "m.onnx"))
    report = he.verify(qmodel, path, [batch], timed=False)
    assert report.integer_match == 1
    assert report.output_difference < 1e-6
