"""Sums and means over segments, written as `scatter_add`."""

import pytest
import torch
from torch import nn

from halfeven.graph.capture import capture
from halfeven.graph.rewrite import lower_scatters

INDEX = torch.tensor([0, 3, 3, 1, 0, 3])


class Pools(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.fc, self.function = nn.Linear(4, 4), function

    def forward(self, x, index):
        return self.function(self.fc(x), index, torch.arange(20.0).view(5, 4))


def reduced(reduce, include_self):
    def function(y, index, start):
        return start.scatter_reduce(0, index[:, None].expand_as(y), y, reduce, include_self=include_self)

    return function


POOLS = {
    "index_add": lambda y, i, start: start.index_add(0, i, y),
    "index_add along the last axis, with a factor": lambda y, i, start: start.T.index_add(-1, i, y.T, alpha=2.0),
    "index_add_ in place": lambda y, i, start: torch.zeros_like(start).index_add_(0, i, y).relu(),
    "sum": reduced("sum", include_self=True),
    "sum without the tensor's own": reduced("sum", include_self=False),
    "mean": reduced("mean", include_self=True),
    "mean without the tensor's own": reduced("mean", include_self=False),
}


@pytest.mark.parametrize("name", POOLS)
def test_they_give_the_same_outputs_and_gradients(name):
    model, x = Pools(POOLS[name]), torch.randn(6, 4)
    captured, _ = capture(model, (x, INDEX))
    assert lower_scatters(captured) == 1
    found, expected = captured(x, INDEX), model(x, INDEX)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    gradients = [torch.autograd.grad((y * weights).sum(), model.fc.weight)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_largest_values_stay():
    captured, _ = capture(Pools(reduced("amax", include_self=True)), (torch.randn(6, 4), INDEX))
    assert lower_scatters(captured) == 0
