"""Files of models with a forward of any form, and operators that a format has no form of."""

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import ExportError


class TwoOutputsInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, *inputs, scale=1.0):
        y = self.first(sum(inputs)).relu() * scale
        return (self.last(y), y) if self.training else self.last(y)


class NoiseInTraining(TwoOutputsInTraining):
    """Its own code stays Python, because it draws numbers in training."""

    def forward(self, *inputs, scale=1.0):
        y = self.first(sum(inputs)).relu() * scale
        return self.last(y + torch.randn_like(y)) if self.training else self.last(y)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("kind", "note"),
    [
        (TwoOutputsInTraining, "The graph returns in training what the float model returns there"),
        (NoiseInTraining, "Its own code stays Python"),
    ],
)
def test_any_number_of_inputs_is_exported(kind, note, count, tmp_path):
    example = tuple(torch.randn(4, 8) for _ in range(count))
    qmodel = he.calibrate(he.prepare(kind().eval(), example, scheme="w7a8"), [example])
    assert note in he.plan_of(qmodel).notes[0]
    path = he.export(qmodel, tmp_path / "m.xml")
    assert he.verify(qmodel, path, [example], timed=False).integer_match == 1


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.words, self.last = nn.EmbeddingBag(30, 8, mode=mode), nn.Linear(8, 3)

    def forward(self, ids):
        return self.last(self.words(ids).relu())


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
def test_bags_of_words_are_refused_in_onnx(mode, tmp_path):
    """ONNX Runtime 1.32 crashes on the exporter's translation, and would take the process with it."""
    ids = torch.randint(0, 30, (4, 6))
    options = {"scheme": "w7a8", "target": "onnxruntime"}
    qmodel = he.calibrate(he.prepare(Bag(mode).eval(), ids, **options), [ids])
    with pytest.raises(ExportError, match=r"no operator for nn\.EmbeddingBag .* as nn\.Embedding"):
        he.export(qmodel, tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
