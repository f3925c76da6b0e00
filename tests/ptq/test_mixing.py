"""Elements by a mask: the numbers of torch.where, and its gradients."""

import pytest
import torch

from halfeven.ptq.reconstruction.mixing import mix_by_mask

pytestmark = pytest.mark.usefixtures("fused")


def test_values_and_gradients_are_those_of_where():
    mask = torch.rand(4, 3, 5, 5) < 0.5
    pairs = [[torch.randn(4, 3, 5, 5, requires_grad=True) for _ in range(2)] for _ in range(2)]
    with torch.no_grad():
        for first, second in zip(*pairs, strict=True):
            second.copy_(first)
    weight = torch.randn(4, 3, 5, 5)
    for function, (chosen, other) in zip((mix_by_mask, torch.where), pairs, strict=True):
        (function(mask, chosen, other) * weight).sum().backward()
    assert torch.equal(mix_by_mask(mask, *pairs[0]), torch.where(mask, *pairs[1]))
    for found, expected in zip(*pairs, strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_tensors_without_gradients_are_mixed_too():
    mask = torch.tensor([True, False])
    assert torch.equal(mix_by_mask(mask, torch.ones(2), torch.zeros(2)), torch.tensor([1.0, 0.0]))
