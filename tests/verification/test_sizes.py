"""One file for all sizes: integers equal the exact simulation's at each, in both runtimes."""

import onnxruntime
import openvino
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from sweeps import crossed

ENDINGS = {"openvino": ".xml", "onnxruntime": ".onnx"}
SIDES = {"images": {2: "height", 3: "width"}}
TOKENS = {"ids": {1: "tokens"}, "mask": {1: "tokens"}}


def block(inputs, outputs, stride=1):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """A pool that rounds up, and a resize to the skip connection."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = block(3, 8), block(8, 16), block(24, 8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, images):
        a = self.a(images)
        b = self.b(F.max_pool2d(a, 2, ceil_mode=True))
        return self.head(self.c(torch.cat([a, F.interpolate(b, size=a.shape[2:], mode="bilinear")], 1)))


class Detector(nn.Module):
    """Two levels whose outputs are flattened and joined, and a global branch."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = block(3, 8, 2), block(8, 16, 2)
        self.lateral, self.gate = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 8, 1)
        self.boxes, self.scores = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 3, 1)

    def forward(self, images):
        p2 = self.stem(images)
        p3 = self.lateral(self.down(p2))
        p2 = p2 + F.interpolate(p3, size=p2.shape[-2:])
        p2 = p2 * self.gate(p2.mean((2, 3), keepdim=True)).sigmoid()
        boxes = torch.cat([self.boxes(p).flatten(2) for p in (p2, p3)], 2)
        scores = torch.cat([self.scores(p).flatten(2) for p in (p2, p3)], 2)
        return {"boxes": boxes.transpose(1, 2), "scores": scores.transpose(1, 2).sigmoid()}


class Texts(nn.Module):
    """An embedding, positions, attention with a padding mask, and a mean over the words that are there."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.layer = nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True)
        self.head = nn.Linear(32, 3)

    def forward(self, ids, mask):
        y = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        y = self.layer(y, src_key_padding_mask=mask == 0)
        shares = mask[:, :, None] / mask.sum(1)[:, None, None]
        return self.head((y * shares).sum(1)), y


def images(height, width, samples=2):
    return torch.randn(samples, 3, height, width)


def texts(length, samples=2):
    mask = (torch.arange(length) < torch.randint(2, length + 1, (samples, 1))).long()
    return {"ids": torch.randint(1, 50, (samples, length)), "mask": mask}


SUBJECTS = {
    "unet": (UNet, SIDES, [images(16, 16), images(21, 14, 1)]),
    "detector": (Detector, SIDES, [images(16, 16), images(13, 22, 3)]),
    "texts": (Texts, TOKENS, [texts(12), texts(31, 3)]),
}


@pytest.mark.parametrize(("name", "target"), crossed(SUBJECTS, ENDINGS))
def test_integers_are_equal_at_every_size(name, target, tmp_path):
    kind, dynamic_shapes, batches = SUBJECTS[name]
    qmodel = he.quantize(kind().eval(), batches, scheme="w7a8", target=target, dynamic_shapes=dynamic_shapes)
    path = he.export(qmodel, tmp_path / f"model{ENDINGS[target]}")
    report = he.verify(qmodel, path, batches, timed=name == "unet")
    if (name, target) == (
        "texts",
        "openvino",
    ):  # its normalization and softmax round a few values otherwise at any size
        assert report.alone_match > 0.9999
    else:
        assert report.integer_match == 1
        assert report.output_difference < 1e-5
    assert report.integer_layers == report.quantizable_layers
    assert name != "unet" or report.latency_ms["deployed"] > 0
    free = sorted({axis for axes in dynamic_shapes.values() for axis in axes.values()})
    assert axes_in(path) == {"batch", *free}


def axes_in(path):
    """Names of the free axes that a file declares for its inputs."""
    if path.suffix == ".xml":
        inputs = openvino.Core().read_model(path).inputs
        known = {"N": "batch", "H": "height", "W": "width"}  # OpenVINO's own short forms
        words = [word for port in inputs for word in str(port.get_node().layout).strip("[]").split(",")]
        return {known.get(word, word.lower()) for word in words} - {"?"}
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return {size for known in session.get_inputs() for size in known.shape if isinstance(size, str)}
