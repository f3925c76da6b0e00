"""Grids and tensors drawn at random, for the tests of arithmetic."""

import torch
from hypothesis import strategies as st

from halfeven.quantization.scheme import Scheme

SIGNED4 = Scheme(bits=4, signed=True)


@st.composite
def schemes(draw, axis=None):
    signed = draw(st.booleans())
    return Scheme(
        bits=draw(st.integers(2, 16)),
        signed=signed,
        symmetric=draw(st.booleans()),
        narrow=signed and draw(st.booleans()),
        axis=axis,
    )


def spread(seed: int, count: int, size: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * size


seeds = st.integers(0, 2**31)
sizes = st.floats(-6, 6).map(lambda power: 10.0**power)
ends = st.floats(-1e6, 1e6, width=32)


def int32(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.int32)
