"""Multiply-accumulates, counted against what PyTorch's own counter says."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from halfeven.graph.capture import capture
from halfeven.graph.cost import multiply_accumulates
from halfeven.graph.rewrite import lower_attention
from placement.parts import Attention


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3))

    def forward(self, x):
        return F.conv2d(x, self.kernel * 2, stride=2)


MODELS = {
    "convolution": (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 16, 16)),
    "depthwise": (nn.Conv2d(8, 8, 5, padding=2, groups=8), (2, 8, 9, 9)),
    "grouped": (nn.Conv2d(8, 16, 3, groups=4), (2, 8, 9, 9)),
    "1-D": (nn.Conv1d(4, 6, 3), (2, 4, 20)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), (2, 4, 7, 7)),
    "linear": (nn.Linear(12, 7), (2, 12)),
    "linear, 3-D": (nn.Linear(12, 7), (2, 5, 12)),
    "a function": (Functional(), (2, 3, 16, 16)),
    "attention": (Attention(), (2, 6, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_count_is_pytorchs(name):
    model, shape = MODELS[name]
    x = torch.randn(shape)
    with FlopCounterMode(display=False) as counter:
        model.eval()(x)
    captured, _ = capture(model, x)
    lower_attention(captured)
    assert 2 * sum(map(multiply_accumulates, captured.graph.nodes)) == counter.get_total_flops()


def test_other_operators_cost_nothing():
    captured, _ = capture(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(3)), torch.randn(2, 3, 8, 8))
    assert not any(map(multiply_accumulates, captured.graph.nodes))
