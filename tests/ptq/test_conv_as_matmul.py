"""A convolution as a matrix product is the convolution, with its gradients."""

import pytest
import torch
from torch import nn

from halfeven.ptq.reconstruction.conv_as_matmul import MAX_POSITIONS, conv_as_matmul, has_few_positions

LAYERS = [
    (nn.Conv2d(5, 7, 3, padding=1), (3, 5, 2, 2)),
    (nn.Conv2d(5, 7, 3, padding=1, stride=2, bias=False), (3, 5, 4, 3)),
    (nn.Conv2d(5, 7, (3, 1), padding=(0, 2), dilation=(2, 1), stride=(1, 3)), (3, 5, 5, 4)),
    (nn.Conv2d(5, 7, 1), (1, 5, 1, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=str)
def test_it_is_the_convolution(layer, shape):
    x = torch.randn(shape, requires_grad=True)
    assert has_few_positions(layer, x)
    expected, found = layer(x), conv_as_matmul(layer, x, layer.weight)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)
    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, layer.weight), direction)
    gotten = torch.autograd.grad(found, (x, layer.weight), direction)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(gotten, wanted, strict=True))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), (2, 4, 3, 2)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), (2, 4, 2, 2)),
        (nn.Conv2d(4, 4, 3, padding="same"), (2, 4, 2, 2)),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (2, 4, 2, 2)),
        (nn.Conv1d(4, 4, 3), (2, 4, 5)),
        (nn.Linear(4, 4), (2, 4)),
    ],
    ids=str,
)
def test_others_stay_what_they_are(layer, shape):
    assert MAX_POSITIONS == 4
    assert not has_few_positions(layer, torch.randn(shape))
