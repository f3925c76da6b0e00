"""All tests: two threads, and the same random numbers in every test whatever ran before it."""

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
