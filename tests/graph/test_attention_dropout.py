"""Dropout inside of attention, or with a probability of 0 in eval mode: restored, or said to be lost."""

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


def called_as_transformers_do(m, y):
    weights = F.dropout(y.softmax(-1), p=0.0 if not m.training else m.dropout, training=m.training)
    return F.dropout(weights * y, 0.2, m.training)


def in_a_row(m, y):
    """Probabilities that grow, as those of stochastic depth do, and a switch that is off."""
    for p in (0.1, 0.0, 0.4):
        y = y + F.dropout(m.a(y), p if m.training else 0.0)
    return F.dropout(y, 0.5, training=False)


class Own(nn.Module):
    """Attention whose probability has the name that halfeven gives the dropout."""

    def __init__(self, *probabilities):
        super().__init__()
        self.attention_dropout = probabilities
        self.qkv = nn.Linear(16, 48)

    def forward(self, y):
        for p in self.attention_dropout:
            q, k, v = self.qkv(y).unflatten(-1, (3, 2, 8)).movedim(2, 0).transpose(2, 3)
            dropped = p if self.training else 0.0
            y = y + F.scaled_dot_product_attention(q, k, v, dropout_p=dropped).transpose(1, 2).flatten(2)
        return y


class Branches(nn.Module):
    """Is captured in parts."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) if x.abs().sum() > 0 else x


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, **heads, attention_probs_dropout_prob=0.4, hidden_dropout_prob=0.2)
    return Attends(lambda m, y: m.a(inputs_embeds=y).last_hidden_state, a=BertModel(config, add_pooling_layer=False))


X = torch.randn(4, 6, 5)
RESTORED = {
    "with weights": lambda: Attends(with_weights, a=attention()),
    "without weights": lambda: Attends(without_weights, a=attention()),
    "a layer of an encoder": lambda: Attends(
        lambda m, y: m.a(y), a=nn.TransformerEncoderLayer(16, 2, 16, 0.3, batch_first=True)
    ),
    "function": lambda: Attends(function(causal=False)),
    "own": lambda: Attends(lambda m, y: m.a(y), a=Own(0.3)),
    "own with several": lambda: Attends(lambda m, y: m.a(y), a=Own(0.3, 0.0, 0.5, 0.3)),
    "called twice": lambda: Attends(lambda m, y: m.a(m.a(y)), a=Own(0.3)),
    "in a part": lambda: Branches(Attends(lambda m, y: m.a(y), a=Own(0.3))),
    "transformers' form": lambda: Attends(called_as_transformers_do, dropout=0.3),
    "in a row": lambda: Attends(in_a_row, a=nn.Linear(16, 16)),
    "bert": bert,
}
LOST = {
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
    assert not any("no effect" in note for note in he.plan_of(qmodel).notes)
    assert set(model.state_dict()) <= set(qmodel.state_dict())
    set_mode(qmodel, Mode.FLOAT)
    torch.testing.assert_close(seeded(qmodel.eval(), X), seeded(model, X))
    torch.testing.assert_close(seeded(qmodel.train(), X), seeded(model.train(), X))
    assert not torch.allclose(qmodel(X), qmodel(X))


def test_a_file_has_no_dropout_inside_of_attention(tmp_path):
    qmodel = he.calibrate(he.prepare(RESTORED["with weights"]().eval(), X, scheme="w7a7"), [X])
    he.export(qmodel, tmp_path / "m.xml")
    assert he.verify(qmodel, tmp_path / "m.xml", [X], timed=False).integer_match == 1


@pytest.mark.parametrize("name", ["own with several", "transformers' form"])
def test_a_loaded_model_drops_out_as_before(name, tmp_path):
    model = RESTORED[name]().eval()
    qmodel = he.calibrate(he.prepare(model, X, scheme="w7a7"), [X])
    he.save(qmodel, tmp_path / "m.safetensors")
    again = he.load(tmp_path / "m.safetensors", model, X).train()
    assert torch.equal(seeded(again, X), seeded(qmodel.train(), X))


def test_a_dropout_that_training_alone_calls_is_said_to_be_lost():
    model = Attends(lambda m, y: F.dropout(y, 0.3) if m.training else y)
    (note,) = [note for note in he.plan(model, X).notes if "ropout" in note]
    assert note.startswith("1 dropout has no effect in training")


@pytest.mark.parametrize("name", LOST)
def test_a_dropout_that_is_lost_is_said(name):
    (note,) = [note for note in he.plan(LOST[name](), X).notes if "ropout" in note]
    assert note.startswith("The dropout inside of 1 attention operator has no effect in training")


def test_nothing_is_said_of_attention_without_dropout():
    plan = he.plan(Attends(function(causal=False, p=0.0)), X)
    assert not any("ropout" in note for note in plan.notes)
