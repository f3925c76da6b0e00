"""The reasons that a plan gives in a model that is captured in parts."""

import torch
from torch import nn

import halfeven as he
from placement.parts import IMAGE, conv


def test_the_output_of_a_part_is_not_said_to_be_the_models():
    model = nn.Sequential(conv(3), nn.ReLU(), conv())
    plan = he.plan(model, torch.randn(IMAGE), leave_out=("2",))
    assert {row.name: row.reason for row in plan.left} == {
        "0:conv2d": "an output of 0, which is captured by itself",
    }
