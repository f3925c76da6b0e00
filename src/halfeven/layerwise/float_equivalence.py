"""Check that an algorithm preserves the function that the float model computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.errors import AlgorithmError
from halfeven.evaluation import evaluating
from halfeven.graph.batchnorm import keep_statistics, kept_statistics
from halfeven.graph.torch_private import pytree
from halfeven.layerwise.sqnr import relative_difference
from halfeven.placement.insertion import recorded_example
from halfeven.quantization.model_quantizers import quantizers, set_mode
from halfeven.quantization.quantizer import Mode

TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output, that float32's rounding may explain."""


@contextmanager
def float_function(qmodel: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and switch all its quantizers off; restore every mode at the end."""
    modes = {quantizer: quantizer.mode for quantizer in quantizers(qmodel).values()}
    try:
        set_mode(qmodel, Mode.FLOAT)
        with evaluating(qmodel):
            yield
    finally:
        for quantizer, mode in modes.items():
            quantizer.mode = mode


def run_example(qmodel: nn.Module) -> Any:
    """Run a model, in its present mode, on the two samples that it was captured with, and return its outputs."""
    example = recorded_example(qmodel)
    assert example is not None
    args, kwargs = example
    device = next(qmodel.parameters()).device
    args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, (args, kwargs))
    return qmodel(*args, **kwargs)


@torch.no_grad()
def example_outputs(qmodel: nn.Module) -> list[Tensor]:
    """Return all floating-point outputs of the float function on the two samples that the model was captured with."""
    with float_function(qmodel):
        found = pytree.tree_leaves(run_example(qmodel))
    return [x for x in found if isinstance(x, Tensor) and x.is_floating_point()]


@contextmanager
def preserving_the_float_function(qmodel: nn.Module, algorithm: str) -> Iterator[None]:
    """Check at the end that the float outputs on the example are the same as at the start.

    Args:
        qmodel: a model from `prepare`.
        algorithm: name for the error message.

    Raises:
        AlgorithmError: the outputs differ by more than `TOLERANCE`; parameters and recorded BatchNorm statistics are
            restored.
    """
    before = {p: p.detach().clone() for p in qmodel.parameters()}
    # Buffers beside the parameters: algorithms that scale channels scale them too.
    statistics = {m: kept for m in qmodel.modules() if (kept := kept_statistics(m)) is not None}
    expected = example_outputs(qmodel)
    yield
    found = example_outputs(qmodel)
    worst = max((relative_difference(*pair) for pair in zip(found, expected, strict=True)), default=0.0)
    if worst <= TOLERANCE:
        return
    with torch.no_grad():
        for parameter, value in before.items():
            parameter.copy_(value)
    for module, kept in statistics.items():
        keep_statistics(module, *kept)
    raise AlgorithmError(
        f"{algorithm} changed the outputs of the float model by {worst:.2g} of the largest output, but it must "
        "preserve them; the model has its earlier weights again. Switch this step off and please report the model: an "
        "operator between two of its layers does not do what halfeven assumes."
    )
