"""A captured model is compared with its original: on equal inputs, random numbers and states."""

import itertools

import pytest
import torch
from torch import nn

from halfeven.errors import CaptureError
from halfeven.graph.capture import capture

X = torch.rand(4, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("state", torch.zeros(1, 8))


class Sampled(Net):
    """A variational encoder, which samples in eval mode too."""

    def forward(self, x):
        mean = self.layer(x)
        return mean + torch.randn_like(mean)


class ChangesInput(Net):
    def forward(self, x):
        x -= 0.5
        x /= 0.25
        return self.layer(x)


class Counts(Net):
    """Remembers, without a consequence."""

    def forward(self, x):
        self.state.add_(1)
        self.last = self.layer(x)
        return self.last


class Decides(Net):
    def forward(self, x):
        y = self.layer(x)
        return {"scores": 1000 * y, "mask": y > 0, "best": y.argmax(-1)}


@pytest.mark.parametrize(
    ("model", "regions"), [(Sampled, [""]), (ChangesInput, [""]), (Counts, ["layer"]), (Decides, [""])]
)
def test_is_captured(model, regions):
    x = X.clone()
    captured, report = capture(model().eval(), x)
    assert report.regions == regions
    assert torch.equal(x, X)
    assert not captured.state.any()


class Streams(Net):
    def forward(self, x):
        y = self.layer(x) + self.state
        self.state.copy_(y.mean(0, keepdim=True))
        return y


class StreamsInAttribute(Net):
    def __init__(self):
        super().__init__()
        self.last = torch.zeros(1, 8)

    def forward(self, x):
        y = self.layer(x) + self.last
        self.last = y.detach().mean(0, keepdim=True)
        return y


class Varies(Net):
    clock = itertools.count()

    def forward(self, x):
        return self.layer(x) + next(self.clock)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Streams, "remembers earlier calls"), (StreamsInAttribute, "remembers earlier calls"), (Varies, "each time")],
)
def test_results_of_more_than_the_inputs_are_refused(model, reason):
    with pytest.raises(CaptureError, match=reason):
        capture(model().eval(), X)


def test_padding_in_torchs_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 1).eval()
    padding = torch.tensor([[False, False, False], [False, True, True]])
    captured, _ = capture(model, {"src": torch.randn(2, 3, 8), "src_key_padding_mask": padding})
    assert isinstance(captured.layers[0].linear1, nn.Linear)


class Adapter(Net):
    """Its eval mode has the adapter in the weight, as in some libraries for low-rank adapters."""

    def __init__(self):
        super().__init__()
        self.adapter, self.merged = nn.Parameter(torch.randn(8, 8)), False

    def train(self, mode=True):
        super().train(mode)
        if mode is self.merged:
            self.layer.weight.data += (1 - 2 * mode) * self.adapter.data
            self.merged = not mode
        return self

    def forward(self, x):
        return self.layer(x) if self.merged else self.layer(x) + x @ self.adapter.T


def test_a_mode_that_changes_weights():
    model = Adapter()
    captured, report = capture(model.eval(), X)
    assert [kept.name for kept in report.kept] == [""]
    assert torch.allclose(captured.train()(X), captured.eval()(X), atol=1e-6)
