"""Small networks whose layers are linked in every way, with channels of very different ranges."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he

IMAGE = (2, 3, 8, 8)


def uneven(model: nn.Module) -> nn.Module:
    """The model with factors from 1/30 to 30 on the output channels, random biases and BatchNorm statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.3, 3)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
        elif hasattr(module, "weight") and module.weight is not None and module.weight.ndim > 1:
            axis = 1 if getattr(module, "transposed", False) else 0
            factor = torch.exp((torch.rand(module.weight.shape[axis]) - 0.5) * 6.8)
            shape = [1] * module.weight.ndim
            shape[axis] = -1
            module.weight.data *= factor.reshape(shape)
            if module.bias is not None:
                nn.init.normal_(module.bias)
    return model.eval()


def prepared(model: nn.Module, shape=IMAGE, **options) -> nn.Module:
    return he.prepare(model, torch.randn(shape), batchnorm="fold", **options)


def normalized() -> nn.Module:
    """A network with BatchNorm and dropout, for images of `growing_batches`."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(2))


def growing_batches(count: int = 4) -> list[torch.Tensor]:
    """Batches of images, each with a larger standard deviation than the batch before."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 1, 6, 6, generator=generator) * (i + 1) for i in range(count)]


class Residual(nn.Module):
    """conv1 -> conv2 are linked; nothing is across the addition."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv2(F.relu(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Halves(nn.Module):
    """Two captured regions with Python between them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 2, 3))

    def forward(self, x):
        x = self.first(x)
        if float(x.detach().sum()) == 12345.0:  # what torch.export cannot follow
            x = x + 1
        return self.second(x)


class Branches(nn.Module):
    """A concatenation, and an output that is read again; only last -> c are linked."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 4, 1) for _ in range(4))
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x):
        joined = self.last(torch.cat([F.relu(self.a(x)), F.relu(self.b(x))], 1))
        seen = F.relu(self.c(joined))
        return self.d(seen[:, :3]), seen


class Shared(nn.Module):
    """One layer called twice, one called as a function, one with a tied weight; only first -> second are linked."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.twice, self.tied, self.other = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.other.weight = self.tied.weight
        self.matrix = nn.Parameter(torch.randn(5, 5))

    def forward(self, x):
        x = self.second(F.relu(self.first(x)))
        x = self.twice(F.relu(self.twice(F.relu(x))))
        x = F.linear(F.relu(x), self.matrix)
        return self.other(F.relu(self.tied(F.relu(x))))


def chain(*layers):
    """What makes a network of these layers, each time from new ones: a test may change them."""

    def build() -> nn.Module:
        model = copy.deepcopy(nn.Sequential(*(layer() if isinstance(layer, type) else layer for layer in layers)))
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        return model

    return build


NETS = {
    "conv": (chain(nn.Conv2d(3, 8, 3), nn.ReLU, nn.Conv2d(8, 4, 3)), IMAGE, [("0", "2")]),
    "three": (
        chain(nn.Conv2d(3, 8, 3), nn.ReLU, nn.Conv2d(8, 6, 3), nn.LeakyReLU(0.1), nn.Conv2d(6, 4, 1)),
        IMAGE,
        [("0", "2"), ("2", "4")],
    ),
    "depthwise": (
        chain(
            nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU,
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU, nn.Conv2d(8, 5, 1),
        ),
        IMAGE,
        [("0", "3", "6")],
    ),
    "two depthwise": (
        chain(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.PReLU(8), nn.Conv2d(8, 8, 3, groups=8),
              nn.Conv2d(8, 2, 1)),
        IMAGE,
        [("0", "1", "3", "4")],
    ),
    "depthwise at both ends": (
        chain(nn.Conv2d(3, 3, 3, groups=3), nn.ReLU, nn.Conv2d(3, 3, 3, groups=3)), IMAGE, [("0", "2")]
    ),
    "more channels a group": (
        chain(nn.Conv2d(3, 4, 1), nn.ReLU, nn.Conv2d(4, 8, 3, groups=4), nn.ReLU, nn.Conv2d(8, 2, 1)),
        IMAGE,
        [("0", "2"), ("2", "4")],
    ),
    "grouped": (
        chain(nn.Conv2d(3, 8, 1), nn.ReLU, nn.Conv2d(8, 6, 3, groups=2), nn.ReLU, nn.Conv2d(6, 9, 1, groups=3)),
        IMAGE,
        [("0", "2"), ("2", "4")],
    ),
    "transposed": (
        chain(nn.ConvTranspose2d(3, 8, 2, 2), nn.ReLU, nn.ConvTranspose2d(8, 6, 3), nn.ReLU,
              nn.Conv2d(6, 4, 1)),
        IMAGE,
        [("0", "2"), ("2", "4")],
    ),
    "one dimension": (
        chain(nn.Conv1d(3, 8, 3), nn.ReLU, nn.MaxPool1d(2), nn.Conv1d(8, 4, 3, padding="same")),
        (2, 3, 20),
        [("0", "3")],
    ),
    "linear": (
        chain(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU, nn.Dropout(0.5), nn.Linear(8, 4)), (4, 5), [("0", "4")]
    ),
    "tokens": (chain(nn.Linear(5, 8), nn.ReLU, nn.Linear(8, 4)), (2, 7, 5), [("0", "2")]),
    "flattened": (
        chain(nn.Conv2d(3, 6, 3), nn.ReLU, nn.AvgPool2d(2, padding=1), nn.ZeroPad2d(1), nn.Flatten(),
              nn.Linear(216, 4)),
        IMAGE,
        [("0", "5")],
    ),
    "residual": (Residual, IMAGE, [("conv1", "conv2")]),
    "branches": (Branches, IMAGE, [("last", "c")]),
    "shared": (Shared, (4, 5), [("first", "second")]),
    "not commuting": (
        chain(nn.Conv2d(3, 4, 1), nn.SiLU, nn.Conv2d(4, 4, 1), nn.ReLU6, nn.Conv2d(4, 4, 1), nn.ConstantPad2d(1, 2.0),
              nn.Conv2d(4, 4, 1)),
        IMAGE,
        [],
    ),
    "other axes": (chain(nn.Linear(8, 8), nn.ReLU, nn.AvgPool1d(2), nn.Linear(4, 4)), (2, 3, 8), []),
    "tokens flattened": (chain(nn.Linear(5, 8), nn.ReLU, nn.Flatten(), nn.Linear(56, 4)), (2, 7, 5), []),
}  # fmt: skip
"""Name -> what makes the network, the shape of its input, and its chains of linked layers."""
