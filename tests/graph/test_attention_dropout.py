"""Dropout inside of attention: restored in torch's own module, and said to be lost in code of one's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he
from halfeven.quantization.model_quantizers import set_mode
from halfeven.quantization.quantizer import Mode

pytestmark = pytest.mark.usefixtures("unfused")


class Attends(nn.Module):
    """Self-attention by a function of the module and its input."""

    def __init__(self, attend, **parts):
        super().__init__()
        self.attend = attend
        self.i, self.o = nn.Linear(5, 16), nn.Linear(16, 3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.o(self.attend(self, self.i(x)))


def with_weights(m, y):
    for _ in range(2):
        y, weights = m.a(y, y, y)
    return y + weights.sum()


def without_weights(m, y):
    return m.a(y, y, y, need_weights=False)[0]


def function(causal, p=0.5):
    return lambda m, y: F.scaled_dot_product_attention(y, y, y, dropout_p=p if m.training else 0.0, is_causal=causal)


def attention(p=0.5):
    return nn.MultiheadAttention(16, 2, dropout=p, batch_first=True)


X = torch.randn(4, 6, 5)
RESTORED = {
    "with weights": lambda: Attends(with_weights, a=attention()),
    "without weights": lambda: Attends(without_weights, a=attention()),
    "a layer of an encoder": lambda: Attends(
        lambda m, y: m.a(y), a=nn.TransformerEncoderLayer(16, 2, 16, 0.3, batch_first=True)
    ),
}
LOST = {
    "function": lambda: Attends(function(causal=False)),
    "causal function": lambda: Attends(function(causal=True)),
    "causal module": lambda: Attends(
        lambda m, y: m.a(y, y, y, need_weights=False, attn_mask=MASK, is_causal=True)[0], a=attention()
    ),
}
MASK = nn.Transformer.generate_square_subsequent_mask(6)


def seeded(model, x):
    torch.manual_seed(3)
    return model(x)


@pytest.mark.parametrize("name", RESTORED)
def test_the_dropout_of_torchs_module_is_that_of_the_float_model(name):
    model = RESTORED[name]()
    qmodel = he.calibrate(he.prepare(model.eval(), X, scheme="w7a7"), [X])
    assert not any("ropout" in note for note in he.plan_of(qmodel).notes)
    assert set(model.state_dict()) <= set(qmodel.state_dict())
    set_mode(qmodel, Mode.FLOAT)
    torch.testing.assert_close(seeded(qmodel.eval(), X), seeded(model, X))
    torch.testing.assert_close(seeded(qmodel.train(), X), seeded(model.train(), X))
    assert not torch.allclose(qmodel(X), qmodel(X))


def test_a_file_has_no_dropout_inside_of_attention(tmp_path):
    qmodel = he.calibrate(he.prepare(RESTORED["with weights"]().eval(), X, scheme="w7a7"), [X])
    he.export(qmodel, tmp_path / "m.xml")
    assert he.verify(qmodel, tmp_path / "m.xml", [X], timed=False).integer_match == 1


@pytest.mark.parametrize("name", LOST)
def test_a_dropout_that_is_lost_is_said(name):
    (note,) = [note for note in he.plan(LOST[name](), X).notes if "ropout" in note]
    assert note.startswith("The dropout inside of 1 attention operator has no effect in training")


def test_nothing_is_said_of_attention_without_dropout():
    plan = he.plan(Attends(function(causal=False, p=0.0)), X)
    assert not any("ropout" in note for note in plan.notes)
