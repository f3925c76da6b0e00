"""Re-estimation of BatchNorm's statistics: running averages are replaced by averages under the present weights.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", section 3.3 (arXiv:2203.11086): while weights
flip between two integers, running averages describe none of the networks that were seen, so the statistics are taken
anew from the final weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import CalibrationError
from halfeven.evaluation import evaluating
from halfeven.layerwise.batches import on_device, read_inputs
from halfeven.layerwise.batchnorm_statistics import average_batchnorm, batchnorms


@checked_arguments(CalibrationError)
@torch.no_grad()
def re_estimate(model: nn.Module, loader: Iterable[Any], batches: int = 50) -> None:
    """Set BatchNorm's running statistics to the mean of single batches' means and variances under the present weights.

    All other modules compute in eval mode; modes, momentum and batch counters are restored. In a distributed run every
    process must call this function: the statistics are averaged over the processes.

    Args:
        model: any module; one without BatchNorm stays as it is, and the loader is not read.
        loader: batches of inputs, as for `halfeven.calibrate`.
        batches: largest number of batches to read.

    Raises:
        CalibrationError: the loader is empty.
    """
    layers = list(batchnorms(model).values())
    if not layers:
        return
    device = next(model.parameters()).device
    seen = 0
    # `evaluating` puts all modules in eval mode first (no dropout, no moving ranges), then BatchNorm alone trains.
    with evaluating(model), _plain_averages(layers, device):
        for inputs in read_inputs(model, loader, batches):
            args, kwargs = on_device(model, inputs)
            model(*args, **kwargs)
            seen += 1
    if seen == 0:
        raise CalibrationError(
            "The loader gave no batch, so BatchNorm has no statistics to be re-estimated from. Give a loader with at "
            "least one batch of calibration inputs; an iterator that was used up before looks empty."
        )
    average_batchnorm(model)


@contextmanager
def _plain_averages(layers: list[Any], device: torch.device) -> Iterator[None]:
    """Make BatchNorm layers take the plain mean over the batches seen within; restore momentum and counters."""
    kept = [(layer, layer.momentum, layer.num_batches_tracked) for layer in layers]
    try:
        for layer in layers:
            # Without momentum, PyTorch takes the plain mean over all batches since the reset.
            layer.num_batches_tracked = torch.zeros((), dtype=torch.long, device=device)
            layer.momentum = None
            layer.train()
        yield
    finally:
        for layer, momentum, tracked in kept:
            layer.momentum = momentum
            layer.num_batches_tracked = tracked
