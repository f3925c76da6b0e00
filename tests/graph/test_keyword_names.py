"""Parts whose names are keywords of Python, which torch.fx would write into its code as they are."""

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.errors import CaptureError


class NamedByKeywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({"class": nn.Linear(8, 3), "in": nn.Linear(8, 2)})
        self.weights = nn.ParameterDict({"from": nn.Parameter(torch.randn(8, 8))})
        self.register_buffer("lambda", torch.tensor(0.5))

    def forward(self, x):
        y = F.relu(F.linear(x, self.weights["from"])) * getattr(self, "lambda")
        return {name: head(y) for name, head in self.heads.items()}


def test_parts_may_have_the_names_of_keywords(tmp_path):
    model, x = NamedByKeywords(), torch.randn(4, 8)
    qmodel = he.calibrate(he.prepare(model, x, scheme="w7a7"), [x]).eval()
    assert not he.plan_of(qmodel).notes
    assert set(model.state_dict()) <= set(qmodel.state_dict())
    again = pickle.loads(pickle.dumps(qmodel))
    assert torch.equal(again(x)["class"], qmodel(x)["class"])
    he.export(qmodel, tmp_path / "m.xml")
    assert he.verify(qmodel, tmp_path / "m.xml", [x], timed=False).integer_match == 1


class AnyInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, **inputs):
        return self.last(sum(self.first(x) for x in inputs.values()).relu())


@pytest.mark.parametrize(("name", "better"), [("class", "class_"), ("pixel-values", "pixel_values"), ("2d", "_2d")])
def test_an_input_that_cannot_be_a_parameter_is_named(name, better):
    with pytest.raises(CaptureError, match=f'no parameter called {name}, .* for example to "{better}"'):
        he.prepare(AnyInputs(), {"x": torch.randn(4, 8), name: torch.randn(4, 8)})


def test_a_part_with_an_input_that_cannot_be_a_parameter_says_so():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.inner = nn.Linear(8, 8), AnyInputs()

        def forward(self, x):
            return self.inner(**{"in": self.first(x) if x.sum() > 0 else x})

    notes = he.plan(Branches(), torch.randn(4, 8)).notes
    assert any("inner: CaptureError: A graph is a function" in note and "called in" in note for note in notes)
