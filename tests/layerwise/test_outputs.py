"""Distances between outputs of two models."""

import pytest
import torch
from torch import nn

import halfeven as he
from halfeven.errors import CalibrationError
from halfeven.layerwise.outputs import first_samples, float_outputs, quantized_outputs
from halfeven.layerwise.sqnr import decibels, relative_difference, sqnr, top1_agreement


def test_sqnr_is_the_ratio_of_powers_over_all_tensors():
    expected = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    found = [torch.tensor([3.0, 0.3]), torch.tensor([[4.4]])]
    assert sqnr(found, expected) == pytest.approx(20.0)
    assert sqnr(expected, expected) == float("inf")


def test_decibels_of_a_relative_error():
    assert decibels(0.01) == pytest.approx(20.0)
    assert decibels(0.0) == pytest.approx(300.0)


def test_the_largest_difference_is_relative_to_the_largest_value():
    expected = torch.tensor([-10.0, 1.0])
    assert relative_difference(expected + 0.1, expected) == pytest.approx(0.01, rel=1e-4)
    assert relative_difference(torch.tensor([float("nan"), 1.0]), expected) == float("inf")
    assert relative_difference(torch.empty(0), torch.empty(0)) == 0


def test_top1_agreement_is_a_fraction_of_the_samples_of_classifiers():
    logits = [torch.eye(4), torch.eye(4)]
    assert top1_agreement([torch.eye(4), torch.eye(4).flip(0)], logits) == 0.5
    assert top1_agreement([torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 4)]) is None
    assert top1_agreement([torch.zeros(2, 1)], [torch.zeros(2, 1)]) is None


def test_first_samples_are_whole_batches():
    batches = [torch.zeros(3, 2), (torch.zeros(3, 2), torch.zeros(3)), torch.zeros(3, 2)]
    assert first_samples(batches, 4) == batches[:2]
    assert first_samples(iter(batches), 100) == batches


def test_outputs_of_both_forms_leave_the_model_as_it_was():
    net = nn.Linear(4, 3)
    batches = [torch.randn(5, 4), torch.randn(2, 4)]
    qmodel = he.prepare(net, batches[0]).train()
    with pytest.raises(CalibrationError):
        quantized_outputs(qmodel, batches)
    he.calibrate(qmodel, batches)
    expected = [net(x) for x in batches]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(float_outputs(qmodel, batches), expected, strict=True))
    assert 20 < sqnr(quantized_outputs(qmodel, batches), expected) < 80
    assert qmodel.training
