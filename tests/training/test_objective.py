"""Model and loss as a module: layouts of images, and the whole model compiled."""

import functools

import pytest
import torch
from torch import nn

from halfeven.tasks import Classification
from halfeven.training.callback import TrainerCallback
from halfeven.training.objective import Objective

LABELS = torch.tensor([0, 2])


class Net(nn.Module):
    """Remembers the layout of what it reads, and whether it ran as Python."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.layouts, self.uncompiled = [], 0

    def forward(self, x):
        if not torch.compiler.is_compiling():
            self.layouts.append(x.is_contiguous(memory_format=torch.channels_last))
            self.uncompiled += 1
        return self.conv(x).mean((2, 3))


class Watching(TrainerCallback):
    has_passing_hooks = False


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_have_their_channels_where_they_should(channels_last):
    net = Net()
    Objective(net, Classification(3), 0.0, TrainerCallback(), channels_last=channels_last)(
        torch.randn(2, 3, 4, 4), LABELS
    )
    assert net.layouts == [channels_last]


def test_a_compiled_model_runs_as_python_while_hooks_that_pass_are_on_it(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    net, callback, images = Net(), Watching(), torch.randn(2, 3, 4, 4)
    objective = Objective(net, Classification(3), 0.0, callback, compiled=True)
    assert set(objective.state_dict()) == {"model.conv.weight", "model.conv.bias"}
    compiled = objective(images, LABELS)
    assert net.uncompiled == 0
    callback.has_passing_hooks = True
    torch.testing.assert_close(objective(images, LABELS), compiled)
    assert net.uncompiled == 1
    callback.has_passing_hooks = False
    objective.run_uncompiled()
    objective(images, LABELS)
    assert net.uncompiled == 2
