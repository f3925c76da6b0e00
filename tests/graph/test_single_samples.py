"""Single samples in the place of batches are refused, and the message says how to make batches of them."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import halfeven as he
from halfeven.errors import CalibrationError, CaptureError

IMAGE = (3, 8, 8)


class Samples(Dataset):
    """A data set whose entries are made by a function."""

    def __init__(self, make):
        self.make = make

    def __len__(self):
        return 4

    def __getitem__(self, place):
        if place >= 4:
            raise IndexError
        return self.make(torch.randn(IMAGE))


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()


@pytest.mark.parametrize(
    "samples",
    [
        TensorDataset(torch.randn(4, *IMAGE), torch.zeros(4)),
        Samples(lambda x: (x, 3)),
        Samples(lambda x: {"input": x, "label": 3}),
    ],
    ids=["tensors", "tuples", "dicts"],
)
def test_a_data_set_of_samples_is_refused(samples):
    """A convolution runs on them, and would take channels for samples."""
    convolution = classifier()[:2]
    with pytest.raises(CalibrationError, match=r"loader is a data set.*single samples.*DataLoader"):
        he.quantize(convolution, samples)
    qmodel = he.prepare(convolution, torch.randn(2, *IMAGE))
    with pytest.raises(CalibrationError, match=r"loader is a data set.*single samples.*DataLoader"):
        he.calibrate(qmodel, samples)


def test_a_data_set_of_batches_is_read():
    batches = Samples(lambda x: (torch.stack([x, x]), torch.zeros(2)))
    qmodel = he.quantize(classifier(), batches)
    assert he.plan_of(qmodel).weights


def test_a_sample_without_batch_axis_is_told_from_inputs_that_never_run():
    with pytest.raises(CaptureError, match=r"runs if a batch axis stands before.*DataLoader.*x\[None\]"):
        he.quantize(classifier(), [torch.randn(IMAGE)])
    with pytest.raises(CaptureError) as caught:
        he.prepare(classifier(), torch.randn(2, 5, 8, 8))
    assert "batch axis" not in str(caught.value)


def test_a_sample_for_a_prepared_model_is_told():
    qmodel = he.prepare(classifier(), torch.randn(2, *IMAGE))
    with pytest.raises(CalibrationError, match=r"For single samples, .*x\[None\]"):
        he.calibrate(qmodel, [torch.randn(IMAGE)])
