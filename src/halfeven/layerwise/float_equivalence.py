"""Proof that an algorithm left alone what the float model computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from halfeven.errors import AlgorithmError
from halfeven.evaluation import evaluating
from halfeven.graph.batchnorm import keep_statistics, kept_statistics
from halfeven.placement.insertion import recorded_example
from halfeven.quantization.quantizer import Mode, quantizers, set_mode

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output, that float32's rounding may explain."""


@contextmanager
def float_function(qmodel: nn.Module) -> Iterator[None]:
    """Within: the model in eval mode with all quantizers off. Afterwards every mode is as it was."""
    modes = {quantizer: quantizer.mode for quantizer in quantizers(qmodel).values()}
    try:
        set_mode(qmodel, Mode.FLOAT)
        with evaluating(qmodel):
            yield
    finally:
        for quantizer, mode in modes.items():
            quantizer.mode = mode


def run_example(qmodel: nn.Module) -> Any:
    """What the model, as it stands, makes of the two samples that it was captured with."""
    example = recorded_example(qmodel)
    assert example is not None
    args, kwargs = example
    device = next(qmodel.parameters()).device
    args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (args, kwargs))
    return qmodel(*args, **kwargs)


@torch.no_grad()
def float_outputs(qmodel: nn.Module) -> list[Tensor]:
    """All output tensors that the float function makes of the two samples that the model was captured with."""
    with float_function(qmodel):
        found = pytree.tree_leaves(run_example(qmodel))
    return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


@contextmanager
def preserving_the_float_function(qmodel: nn.Module, algorithm: str) -> Iterator[None]:
    """Check that what is done within leaves the float outputs on the example as they were.

    Raises:
        AlgorithmError: it did not; the parameters, and what layers keep of BatchNorm, are as before.
    """
    before = {p: p.detach().clone() for p in qmodel.parameters()}
    statistics = {m: kept for m in qmodel.modules() if (kept := kept_statistics(m)) is not None}
    expected = float_outputs(qmodel)
    yield
    worst = max((relative_difference(*pair) for pair in zip(float_outputs(qmodel), expected, strict=True)), default=0.0)
    if worst <= TOLERANCE:
        return
    with torch.no_grad():
        for parameter, value in before.items():
            parameter.copy_(value)
    for module, kept in statistics.items():
        keep_statistics(module, *kept)
    raise AlgorithmError(
        f"{algorithm} changed what the float model computes by {worst:.2g} of its largest output, and it must not "
        "change it at all; the model is as it was. Leave this step out, and please report the model: an operator "
        "between two of its layers is not what it was taken for."
    )


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest expected value; infinite where the result is not finite."""
    if not expected.numel():
        return 0.0
    scale = float(expected.abs().max()) or 1.0
    worst = float((found - expected).abs().max()) / scale
    return worst if worst == worst else float("inf")


def sqnr(found: Any, expected: Any) -> float:
    """Signal-to-noise ratio of tensors in dB: 10 log10(sum expected^2 / sum (found - expected)^2)."""
    signal = sum(float(e.double().square().sum()) for e in expected)
    noise = sum(float((f - e).double().square().sum()) for f, e in zip(found, expected, strict=True))
    return float(10 * torch.log10(torch.tensor(signal / noise))) if noise else float("inf")
