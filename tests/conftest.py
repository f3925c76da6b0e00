"""All tests: one thread, which is fastest for tiny models, and the same random numbers whatever ran before."""

import os

os.environ.setdefault("CI", "true")  # else OpenVINO reports its use over the network, a third of each test

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
