"""Outputs of a model, in its float or quantized form, on the same few samples: what two models are compared by."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.evaluation import evaluating
from halfeven.graph.torch_private import pytree
from halfeven.layerwise.batches import naming_batch, on_device, read_inputs
from halfeven.layerwise.float_equivalence import float_function


def first_samples(batches: Iterable[Any], count: int) -> list[Any]:
    """Return the first batches that together hold at least `count` samples, or all batches where there are fewer."""
    found: list[Any] = []
    samples = 0
    for batch in batches:
        found.append(batch)
        # The largest first size is that of the samples: a batch may hold tables and masks too.
        samples += max((x.shape[0] for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)), default=1)
        if samples >= count:
            break
    return found


def float_outputs(qmodel: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    """Return all floating-point outputs of a quantized model with its quantizers off, batch after batch."""
    with float_function(qmodel):
        return _collect_outputs(qmodel, batches)


def quantized_outputs(qmodel: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    """Return all floating-point outputs of a calibrated model, batch after batch.

    Raises:
        CalibrationError: a range is not set.
    """
    with evaluating(qmodel):
        return _collect_outputs(qmodel, batches)


@torch.no_grad()
def _collect_outputs(model: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for number, inputs in enumerate(read_inputs(model, batches)):
        args, kwargs = on_device(model, inputs)
        with naming_batch(number):
            leaves = pytree.tree_leaves(model(*args, **kwargs))
        found += [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
    return found
