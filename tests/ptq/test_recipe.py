"""The steps that are chosen, and the reasons that are given."""

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import ConfigError
from halfeven.ptq import recipe as r
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.recipe import decide

STEP_OF = {
    "equalize": r.EQUALIZE,
    "relu6": r.UNCLIP,
    "absorb": r.ABSORB,
    "smooth": r.SMOOTH,
    "reparametrize": r.REPARAMETRIZE,
    "reconstruct": r.RECONSTRUCT,
    "correct_biases": r.CORRECT_BIASES,
}
"""Option -> the step that it switches."""


def net(act=nn.ReLU6, gain=1):
    """Linked layers; a large gain lets ReLU6 clip most of what comes."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 1), act(), nn.Conv2d(4, 4, 3, groups=4), act(), nn.Conv2d(4, 2, 1)]
    layers[0].weight.data *= gain
    return nn.Sequential(*layers).eval()


class Tokens(nn.Module):
    """LayerNorm that a linear layer reads, and one more layer."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc, self.last = nn.LayerNorm(8), nn.Linear(8, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(torch.relu(self.fc(self.norm(x))))


TOKENS = {"model": Tokens().eval(), "shape": (2, 5, 8)}


def steps(model=None, shape=(2, 3, 8, 8), data=True, ptq=None, **options):
    qmodel = he.prepare(model or net(), torch.randn(shape), batchnorm="fold", **options)
    recipe = decide(qmodel, ptq or PTQOptions(), data=data)
    return {option for option, step in STEP_OF.items() if recipe.enabled(step)}, recipe


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, set()),
        ({"scheme": "w7a8"}, set()),  # what processors without VNNI take
        ({"scheme": "w6a8"}, {"reconstruct"}),
        ({"scheme": "w4a8"}, {"reconstruct"}),
        ({"scheme": "w8a4"}, {"reconstruct"}),
        ({"rules": (he.Rule(pattern="4", weight_bits=4),)}, {"reconstruct"}),
        ({"rules": (he.Rule(pattern="2", activation_bits=4),)}, {"reconstruct"}),
        ({"scheme": "w4a8", "rules": (he.Rule(weight_bits=8),)}, set()),
        ({"rules": (he.Rule(pattern="2", per_channel=False),)}, {"equalize", "relu6", "absorb", "correct_biases"}),
        ({"per_channel": False, "rules": (he.Rule(per_channel=True),)}, set()),
        ({"per_channel": False}, {"equalize", "relu6", "absorb", "correct_biases"}),
        ({"per_channel": False, "scheme": "w4a8"}, {"equalize", "relu6", "absorb", "reconstruct"}),
        ({"scheme": "w4a8", "data": False}, {"correct_biases"}),
        ({"per_channel": False, "data": False}, {"equalize", "relu6", "absorb", "correct_biases"}),
        (
            {"per_channel": False, "data": False, "model": net(gain=40)},
            {"equalize", "relu6", "absorb", "correct_biases"},
        ),
        ({"per_channel": False, "model": net(nn.ReLU)}, {"equalize", "absorb", "correct_biases"}),
        (TOKENS, {"smooth"}),
        ({**TOKENS, "scheme": "w4a4"}, {"reconstruct"}),
        ({**TOKENS, "scheme": "w8a4"}, {"smooth", "reparametrize", "reconstruct"}),
        ({**TOKENS, "rules": (he.Rule(pattern="fc", weight_bits=4),)}, {"reconstruct"}),
        ({**TOKENS, "rules": (he.Rule(pattern="last", weight_bits=4),)}, {"smooth", "reconstruct"}),
        ({**TOKENS, "data": False}, {"correct_biases"}),
    ],
)
def test_the_steps_that_options_lead_to(options, expected):
    assert steps(**options)[0] == expected


@pytest.mark.parametrize(
    ("ptq", "options", "expected"),
    [
        ({"reconstruct": "off", "correct_biases": "off"}, {"scheme": "w4a4"}, set()),
        ({"equalize": "on", "relu6": "keep", "absorb": "off", "correct_biases": "off"}, {}, {"equalize"}),
        ({"relu6": "replace", "correct_biases": "off"}, {}, {"relu6"}),
        ({"reconstruct": "layers", "correct_biases": "on"}, {}, {"reconstruct", "correct_biases"}),
    ],
)
def test_every_step_can_be_switched(ptq, options, expected):
    found, recipe = steps(ptq=PTQOptions(**ptq), **options)
    assert found == expected
    assert recipe.granularity == ("layers" if ptq.get("reconstruct") == "layers" else "blocks")


@pytest.mark.parametrize(
    ("ptq", "options"),
    [
        ({"smooth": "on"}, {}),
        ({"reparametrize": "on"}, {}),
        ({"smooth": "on"}, {**TOKENS, "data": False}),
        ({"reconstruct": "layers"}, {"data": False}),
    ],
)
def test_a_step_that_cannot_be_taken_is_an_error_where_it_is_insisted_on(ptq, options):
    with pytest.raises(ConfigError, match=r"would have no effect: (it needs data|no LayerNorm)"):
        steps(ptq=PTQOptions(**ptq), **options)


def test_every_choice_is_printed_with_its_reason():
    _, recipe = steps(per_channel=False)
    lines = str(recipe).splitlines()
    assert len(lines) == 8
    assert "one scale serves all channels" in lines[1]
    assert all(line.split()[-1] for line in lines)
    assert sum(" yes " in line for line in lines) == 4
