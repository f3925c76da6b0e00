"""Which axis is the batch, where inputs have first axes of several sizes."""

import pytest
import torch
from torch import nn

from halfeven.graph.capture import capture

pytestmark = pytest.mark.usefixtures("unfused")


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x, mask):
        return self.layer(x).relu() * mask


class MaskFirst(Masked):
    def forward(self, mask, x):
        return super().forward(x, mask)


class Queries(nn.Module):
    """Attention of queries, the same for all images, to positions."""

    def __init__(self):
        super().__init__()
        self.layer, self.key = nn.Conv2d(3, 8, 3), nn.Linear(8, 8)

    def forward(self, images, queries):
        return self.key(queries) @ self.layer(images).flatten(2)


class Streamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells = nn.GRU(8, 6, batch_first=True)

    def forward(self, x, state):
        return self.cells(x, state)


def features(samples):
    return torch.randn(samples, 5, 8)


def images(samples):
    return torch.randn(samples, 3, 6, 6)


QUERIES, MASK = torch.randn(10, 8), torch.ones(1, 5, 1)


@pytest.mark.parametrize(
    ("model", "example", "other", "shapes"),
    [
        (Masked, (features(8), MASK), (features(3), MASK), {}),
        (MaskFirst, (MASK, features(8)), (MASK, features(3)), {}),
        (Queries, (images(1), QUERIES), (images(3), QUERIES), {}),
        (Queries, (images(4), QUERIES), (images(3), QUERIES), {}),
        (Queries, (images(4), QUERIES), (images(3), QUERIES[:7]), {"images": {0: "n"}, "queries": {0: "m"}}),
        (
            Streamed,
            (features(4), torch.zeros(1, 4, 6)),
            (features(3), torch.zeros(1, 3, 6)),
            {"x": {0: "batch"}, "state": {1: "batch"}},
        ),
    ],
    ids=["a mask for all", "before its features", "queries", "queries of a batch", "free queries", "state"],
)
def test_the_batch_is_that_of_the_first_tensor(model, example, other, shapes):
    model = model().eval()
    captured, _ = capture(model, example, dynamic_shapes=shapes)
    for inputs in (example, other):
        for found, right in zip(captured(*inputs), model(*inputs), strict=True):
            assert torch.allclose(found, right, atol=1e-5)
    args, _ = captured.halfeven_example
    captured(*args)


def test_an_example_is_cut_to_two_samples_where_no_other_axis_has_their_size():
    class TokensFirst(Masked):
        def forward(self, x, mask):
            return self.layer(x) + mask.sum(1)[:, None, None]

    shapes = {"x": {0: "tokens", 1: "batch"}, "mask": {0: "tokens", 1: "tokens"}}
    captured, _ = capture(TokensFirst().eval(), (torch.randn(6, 4, 8), torch.ones(6, 6)), dynamic_shapes=shapes)
    assert [list(x.shape) for x in captured.halfeven_example[0]] == [[6, 4, 8], [6, 6]]
    assert captured(torch.randn(9, 2, 8), torch.ones(9, 9)).shape == (9, 2, 6)
