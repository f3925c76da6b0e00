"""Small networks with one fault each that ruins them when quantized: what `diagnose` has to find."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfeven as he


@dataclass(frozen=True)
class Faulty:
    """A float model with its batches, and the options of `prepare` under which the fault shows."""

    model: nn.Module
    batches: list[Any]
    options: dict[str, Any] = field(default_factory=dict)


class LogMel(nn.Module):
    """A Fourier transform as convolution, powers, mel filters and a logarithm, before a small network."""

    def __init__(self, n: int = 64) -> None:
        super().__init__()
        k, t = torch.arange(n // 2 + 1.0)[:, None], torch.arange(float(n))
        wave = torch.cat([torch.cos(2 * torch.pi * k * t / n), torch.sin(2 * torch.pi * k * t / n)])
        self.register_buffer("wave", (torch.hann_window(n) * wave)[:, None])
        self.register_buffer("mel", F.normalize(torch.rand(12, n // 2 + 1).pow(8), p=1, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        re, im = F.conv1d(x[:, None], self.wave, stride=32).chunk(2, 1)
        return torch.log(self.mel @ (re**2 + im**2) + 1e-6)


def front_end() -> Faulty:
    """Sounds between loud and quiet through a front end inside of the model."""
    body = (nn.Conv1d(12, 16, 3), nn.ReLU(), nn.Conv1d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    model = nn.Sequential(LogMel(), *body, nn.Linear(16, 4))
    loud = 0.5 * 10 ** (-3 * torch.rand(64, 1))
    pitch = torch.randint(1, 5, (64, 1)) * 0.2
    x = loud * torch.sin(pitch * torch.arange(600.0)) + 1e-4 * torch.randn(64, 600)
    return Faulty(model, list(x.split(16)))


class Masked(nn.Module):
    """Scores of tokens, where padding gets -1e4, plus those of their neighbours, weigh the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score, self.near = nn.Conv1d(6, 24, 1), nn.Conv1d(24, 24, 1), nn.Conv1d(6, 24, 3, padding=1)
        self.head = nn.Linear(24, 5)
        with torch.no_grad():
            self.score.weight *= 20

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        tokens = F.relu(self.embed(x))
        scores = self.score(tokens) - 1e4 * (1 - mask[:, None])
        return self.head(((scores + self.near(x)).softmax(-1) * tokens).sum(-1))


def additive_mask() -> Faulty:
    """A mask of -1e4 in a sum that a second sum reads as integers."""
    x, lengths = torch.randn(64, 6, 7), torch.randint(2, 8, (64,))
    mask = (torch.arange(7) < lengths[:, None]).float()
    return Faulty(Masked(), list(zip(x.split(16), mask.split(16), strict=True)))


def depthwise(channels: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 1, 1, groups=channels), nn.ReLU(),
        nn.Conv2d(channels, channels, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10),
    )  # fmt: skip


def scaled_depthwise_channel() -> Faulty:
    """A depthwise filter a thousand times the others, whose input is as small, with a scale per tensor."""
    model = depthwise()
    with torch.no_grad():
        model[2].weight[5] *= 500
        model[0].weight[5] /= 500
        model[0].bias[5] /= 500
    return Faulty(model, list(torch.randn(64, 3, 16, 16).split(16)), {"per_channel": False})


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Mixer(nn.Module):
    """Residual blocks of LayerNorm and two layers."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(12, width), nn.ModuleList(block(width) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for part in self.blocks:
            x = x + part(x)
        return self.head(self.norm(x).mean(1))


def outlier_channel() -> Faulty:
    """One channel of a LayerNorm is two hundred times the others; the layer behind reads it with small weights."""
    model = Mixer()
    with torch.no_grad():
        model.blocks[1][0].weight[7] = 300
        model.blocks[1][1].weight[:, 7] /= 300
    return Faulty(model, list(torch.randn(64, 5, 12).split(16)))


def unsettled_batchnorm() -> Faulty:
    """BatchNorm's running statistics have hardly moved from their start."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs, momentum=0.01), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    x = 20 * torch.randn(64, 3, 12, 12) + 10
    model.train()
    with torch.no_grad():
        for batch in x.split(16):
            model(batch)
    return Faulty(model, list(x.split(16)))


class Head(nn.Module):
    """Boxes in pixels and scores, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU())
        self.boxes, self.scores = nn.Conv2d(16, 4, 1), nn.Conv2d(16, 6, 1)
        with torch.no_grad():
            self.boxes.weight.mul_(1000)
            self.boxes.bias.add_(300)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.cat([self.boxes(x), self.scores(x)], 1).flatten(2)


def shared_range() -> Faulty:
    """Boxes and scores share a range, since the output is quantized."""
    return Faulty(Head(), list(torch.randn(64, 3, 16, 16).split(16)), {"quantize_outputs": True})


class TwoInputs(nn.Module):
    """Coordinates in metres beside features, concatenated before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 5)
        with torch.no_grad():
            self.first.weight[:, 12:] /= 2000

    def forward(self, features: Tensor, place: Tensor) -> Tensor:
        x = torch.cat([features, place], 1)
        return self.head(F.relu(self.body(F.relu(self.first(x)))))


def unlike_inputs() -> Faulty:
    """Two inputs of unlike sizes meet in a concatenation."""
    pairs = zip(torch.randn(64, 12).split(16), (2000 * torch.randn(64, 4)).split(16), strict=True)
    return Faulty(TwoInputs(), list(pairs))


def few_bits() -> Faulty:
    """A rule gives one activation 2 bits."""
    rule = he.Rule(pattern="2", activation_bits=2)
    return Faulty(depthwise(), list(torch.randn(64, 3, 16, 16).split(16)), {"rules": (rule,)})


def narrow_range() -> Faulty:
    """Calibrated by an estimator that clips the values that decide."""

    class Spikes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv1d(1, 8, 5), nn.Conv1d(8, 16, 3), nn.Linear(16, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.second(F.relu(self.first(x)))).amax(2))

    x = 0.02 * torch.randn(64, 1, 400)
    x[torch.arange(64), 0, torch.randint(5, 390, (64,))] += 4 * torch.randn(64).abs() + 2
    rule = he.Rule(pattern="first", observer="entropy")
    return Faulty(Spikes(), list(x.split(16)), {"rules": (rule,)})


def channel_made_up_for() -> Faulty:
    """A channel is 400 times the others, and the next layer's weights for it are as small: they vanish."""
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), nn.GELU(), nn.Conv2d(12, 12, 3, 1, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight[2] *= 400
        model[2].weight[:, 2] /= 400
    return Faulty(model, list(torch.randn(64, 3, 12, 12).split(16)))


class Projected(nn.Module):
    """A layer whose weight is a parameter of the model, as in `nn.MultiheadAttention`, behind a LayerNorm."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, 4)
        self.projection = nn.Parameter(nn.Linear(width, width).weight.detach())
        with torch.no_grad():
            self.norm.bias[5] = 200
            self.projection[:, 5] /= 200

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.linear(self.norm(self.embed(x)), self.projection)).mean(1))


def projection_made_up_for() -> Faulty:
    """A channel that LayerNorm shifts far away, and small weights that make up for it."""
    return Faulty(Projected(), list(torch.randn(64, 5, 6).split(16)))


def unlike_rows() -> Faulty:
    """A channel of a transposed convolution is 300 times the others: its weight, its result and the next weight."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    with torch.no_grad():
        model[2].weight[:, 3] *= 300
        model[2].bias[3] *= 300
        model[4].weight[:, 3] /= 300
    return Faulty(model, list(torch.randn(64, 3, 8, 8).split(16)), {"per_channel": False})


def narrow_ranges() -> Faulty:
    """A rule gives all tensors an estimator that clips the values that decide."""
    model = nn.Sequential(nn.Conv1d(1, 8, 5), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(8, 6))
    x = 0.02 * torch.randn(64, 1, 100)
    x[torch.arange(64), 0, torch.randint(5, 90, (64,))] += 4 * torch.randn(64).abs() + 2
    return Faulty(model, list(x.split(16)), {"rules": (he.Rule(pattern="*", observer="entropy"),)})


FAULTS: dict[str, Callable[[], Faulty]] = {
    function.__name__: function
    for function in (
        *(front_end, additive_mask, scaled_depthwise_channel, outlier_channel, unsettled_batchnorm, shared_range),
        *(unlike_inputs, few_bits, narrow_range, channel_made_up_for, projection_made_up_for),
        *(unlike_rows, narrow_ranges),
    )
}


def faulty(name: str) -> Faulty:
    """Return a network, in eval mode and always with the same weights."""
    torch.manual_seed(0)
    made = FAULTS[name]()
    made.model.eval()
    return made
