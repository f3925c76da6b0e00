"""A head that decodes, selects and joins boxes, scores and classes in the network, in both runtimes."""

import pytest
import torch
from torch import nn

from .parity import deployed

SIZE = (2, 3, 32, 32)
PLACES, CLASSES, FOUND = 64, 3, 6


class EndToEnd(nn.Module):
    """Distances by expectations over bins, boxes of hundreds of pixels, the best boxes alone: [samples, 6, 4 + 2]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(32, 4 * 8, 1), nn.Conv2d(32, CLASSES, 1)
        self.bins = nn.Conv2d(8, 1, 1, bias=False).requires_grad_(False)
        self.bins.weight.copy_(torch.arange(8.0).reshape(1, 8, 1, 1))
        y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        self.register_buffer("centres", torch.stack([x.flatten(), y.flatten()])[None] + 0.5)

    def forward(self, x):
        x = self.body(x)
        joined = torch.cat([self.boxes(x), self.scores(x)], 1).flatten(2)
        boxes, scores = joined.split((32, CLASSES), 1)
        boxes = self.bins((4 * boxes).reshape(-1, 4, 8, PLACES).transpose(1, 2).softmax(1)).reshape(-1, 4, PLACES)
        near, far = boxes.chunk(2, 1)
        corners = torch.cat([self.centres - near, self.centres + far], 1) * 80
        best, place = scores.sigmoid().amax(1).topk(FOUND)
        chosen = corners.transpose(1, 2).gather(1, place[..., None].expand(-1, -1, 4))
        classes = scores.argmax(1).gather(1, place)
        return torch.cat([chosen, best[..., None], classes[..., None].float()], 2)


@pytest.mark.parametrize(("target", "file"), [("openvino", "model.xml"), ("onnxruntime", "model.onnx")])
def test_boxes_and_scores_in_one_output(target, file, tmp_path):
    report = deployed(EndToEnd(), SIZE, tmp_path / file, target=target)
    assert report.integer_match == 1.0
    assert report.integer_layers == report.quantizable_layers == 4
