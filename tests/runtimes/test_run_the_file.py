"""The snippets "Run the file" of the documentation compute what verify runs, and the default session is compared."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.runtimes.onnx.file import ACCURACY_LEVEL, WEIGHT_BIAS
from halfeven.verification.default_session import DefaultSession, default_session
from runtimes.parity import SCHEME

DOCS = Path(__file__).parents[2] / "docs" / "targets"
FILES = {"openvino": "model.xml", "onnxruntime": "model.onnx"}


def snippet(target):
    """The Python under "Run the file" of a runtime's page."""
    section = (DOCS / f"{target}.md").read_text().split("## Run the file", 1)[1].split("\n## ", 1)[0]
    return re.search(r"```python\n(.*?)```", section, flags=re.DOTALL)[1]


class Mixed(nn.Module):
    """A layer that a rule leaves in float between quantized tensors, which ONNX Runtime quantizes by default."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 8)
        self.d = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3))
        return self.d(torch.relu(self.c(x)))


@pytest.mark.parametrize("scheme", [SCHEME, "w8a16"])
@pytest.mark.parametrize("target", sorted(FILES))
def test_the_snippet_computes_what_verify_ran(target, scheme, tmp_path, monkeypatch):
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    weights_alone = scheme == "w8a16"
    rules = () if weights_alone else (he.Rule(pattern="b", quantize=False),)
    how = {"reconstruct": "off"} if weights_alone else {}
    qmodel = he.quantize(Mixed().eval(), batches, target=target, scheme=scheme, rules=rules, **how)
    path = he.export(qmodel, tmp_path / FILES[target])
    monkeypatch.chdir(tmp_path)
    names = {"images": batches[0].numpy()}
    exec(snippet(target), names)
    assert np.array_equal(names["logits"], he.load_deployed(path, target)(batches[0]).numpy())
    report = he.verify(qmodel, path, batches, timed=False)
    assert report.findings == []
    assert report.default_session is not None
    assert "difference of the default session" in str(report)
    if target == "onnxruntime":
        assert report.default_session.settings == ([] if weights_alone else [WEIGHT_BIAS])
        assert (report.default_session.difference > 0) is not weights_alone


class File:
    """A file whose outputs are wrong by 1 for each setting of its own that is not made."""

    def __init__(self, settings, matter):
        self.settings, self.matter = settings, matter

    def run_with(self, settings, inputs):
        return [inputs[0] + len(set(self.matter) - set(settings))]


def test_the_settings_that_make_the_difference_are_named():
    x = torch.full((2,), 4.0)
    both = ["a=1", "b=2"]
    assert default_session(File([], []), [x], [x]) is None
    assert default_session(File(both, []), [x], [x]) == DefaultSession(0.0, [])
    assert default_session(File(both, ["b=2"]), [x], [x]) == DefaultSession(0.25, ["b=2"])
    assert default_session(File(both, both), [x], [x]) == DefaultSession(0.5, both)
    assert ACCURACY_LEVEL.count("=") == WEIGHT_BIAS.count("=") == 1
