"""Calibration: run samples through the model and set the range of every quantizer (white paper, section 3.1)."""

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn

from halfeven.errors import CalibrationError
from halfeven.evaluation import evaluating
from halfeven.graph.capture import inputs_of
from halfeven.layerwise.float_equivalence import float_function, run_example
from halfeven.quantization.quantizer import Mode, quantizers


@torch.no_grad()
def calibrate(qmodel: nn.Module, loader: Iterable[Any], batches: int | None = None) -> nn.Module:
    """Set the ranges of all quantizers from data.

    Weight ranges are set first, so that the ranges of activations are those of the model with quantized weights. The
    model computes in eval mode; its training mode is restored, and nothing else of it changes.

    Args:
        qmodel: a model from `prepare`.
        loader: batches: tensors, sequences whose first item is the input (labels are ignored), or dicts of inputs.
        batches: largest number of batches to read; None: all.

    Returns:
        `qmodel` itself.

    Raises:
        CalibrationError: the loader is empty, a tensor was never reached, or a tensor held NaN or infinity; the message
            names it. Earlier ranges are restored.
    """
    found = [q for q in quantizers(qmodel).values() if not q.state.fixed]
    # Only quantizers change here, so that their tensors are all there is to restore.
    before = {q: {k: v.clone() for k, v in q.state_dict().items()} for q in found}
    try:
        for quantizer in found:
            quantizer.start_calibration()
        with evaluating(qmodel):
            # A weight's quantizer sets its range at its first call and quantizes from then on (`Quantizer._calibrate`),
            # so the activations that observers see are those of quantized weights.
            run_batches(qmodel, loader, batches)
        for quantizer in found:
            quantizer.finish_calibration()
    # Ctrl-C too: an interrupted calibration must not leave observers behind.
    except BaseException:
        for quantizer in found:
            quantizer.mode = Mode.QUANTIZE
            quantizer.observer = None
            quantizer.load_state_dict(before[quantizer])
        raise
    return qmodel


def run_batches(qmodel: nn.Module, loader: Iterable[Any], batches: int | None = None) -> None:
    """Run batches through a model in its present mode, for hooks and observers to see the tensors.

    Raises:
        CalibrationError: the loader is empty.
    """
    device = next((p.device for p in qmodel.parameters()), torch.device("cpu"))
    count = 0
    for batch in islice(loader, batches):
        args, kwargs = inputs_of(batch)
        qmodel(*(a.to(device) for a in args), **{k: v.to(device) for k, v in kwargs.items()})
        count += 1
    if not count:
        raise CalibrationError(
            "Calibration got no batch, so no range can be set. Give a loader with at least one batch (an iterator that "
            "was used up before looks empty), and batches= of at least 1."
        )


@torch.no_grad()
def set_weight_ranges(qmodel: nn.Module, *, missing_only: bool = False) -> None:
    """Set the ranges of weights as `calibrate` does, without data; ranges of activations stay.

    Args:
        qmodel: a model from `prepare`.
        missing_only: keep ranges that are set already.

    Raises:
        CalibrationError: a weight holds NaN or infinity, or is not used; the message names it.
    """
    found = [q for q in quantizers(qmodel).values() if q.weight and not q.state.fixed]
    found = [q for q in found if not (missing_only and q.state.has_range)]
    with float_function(qmodel):
        try:
            for quantizer in found:
                quantizer.start_calibration()
            # Quantizers see the weights when the layers are called; the numbers of the example do not matter.
            run_example(qmodel)
            for quantizer in found:
                quantizer.finish_calibration()
        finally:
            for quantizer in found:
                quantizer.observer = None
