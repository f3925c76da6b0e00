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


class Products(nn.Module):
    """A product by a parameter, or of activations, in any of PyTorch's spellings."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(12, 12))

    def forward(self, x):
        return self.function(x, self.weight)


MODELS = {
    "einsum": (Products(lambda x, w: torch.einsum("bnc,cd->bnd", x, w)), (2, 5, 12)),
    "einsum of activations": (Products(lambda x, w: torch.einsum("bnc,bmc->bnm", x, x)), (2, 5, 12)),
    "mm": (Products(torch.mm), (2, 12)),
    "addmm": (Products(lambda x, w: torch.addmm(w[0], x, w)), (2, 12)),
    "bmm": (Products(lambda x, w: torch.bmm(x, x.transpose(1, 2))), (2, 5, 12)),
    "baddbmm": (Products(lambda x, w: torch.baddbmm(x, x, w.expand(x.shape[0], 12, 12))), (2, 5, 12)),
    "tensordot": (Products(lambda x, w: torch.tensordot(x, w, 1)), (2, 5, 12)),
    "matmul by a parameter": (Products(torch.matmul), (2, 5, 12)),
    "bilinear form": (Products(lambda x, w: ((x @ w) * x).sum(-1)), (2, 12)),
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


def captured_work(model, x):
    captured, _ = capture(model.eval(), x)
    return sum(map(multiply_accumulates, captured.graph.nodes))


def test_attention_that_stays_whole():
    q = torch.randn(2, 3, 5, 8)
    causal = Products(lambda x, w: F.scaled_dot_product_attention(x, x, x, is_causal=True))
    assert captured_work(causal, q) == 2 * 3 * 5 * 5 * (8 + 8)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("cells", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_the_work_of_recurrent_cells(cells, gates, bidirectional):
    model = cells(6, 8, num_layers=2, batch_first=True, bidirectional=bidirectional)
    directions = 2 if bidirectional else 1
    each = gates * 8 * (6 + 8) + gates * 8 * (8 * directions + 8)
    assert captured_work(model, torch.randn(2, 5, 6)) == 2 * 5 * each * directions


def test_other_operators_cost_nothing():
    captured, _ = capture(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(3)), torch.randn(2, 3, 8, 8))
    assert not any(map(multiply_accumulates, captured.graph.nodes))
