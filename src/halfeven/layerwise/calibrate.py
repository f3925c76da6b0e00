"""Calibration: run samples through the model and set the range of every quantizer (white paper, section 3.1)."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import CalibrationError
from halfeven.evaluation import evaluating
from halfeven.graph.batches import Inputs, tensors_of
from halfeven.graph.wrappers import unwrapped
from halfeven.layerwise.batches import computing_batch, on_device, read_inputs
from halfeven.layerwise.clipping import counting_clipped, warn_of_unsettled
from halfeven.layerwise.float_equivalence import float_function, run_example
from halfeven.layerwise.training_mode import normalizing_by_batch, trained_batchnorms
from halfeven.progress_bar import advancing, count_of, progress
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Mode, Quantizer


@checked_arguments(CalibrationError)
@torch.no_grad()
def calibrate(qmodel: nn.Module, loader: Iterable[Any], batches: int | None = None) -> nn.Module:
    """Set the ranges of all quantizers from data.

    Weight ranges are set first, so that the ranges of activations are those of the model with quantized weights. The
    model computes in eval mode; its training mode is restored, and nothing else of it changes.

    Training normalizes by the batch. Where BatchNorm's running statistics do not describe the batches yet, ranges of
    eval mode would clip most of what training computes: ranges are then set from both modes, and a warning says so.

    Args:
        qmodel: a model from `prepare`, wrapped or not.
        loader: batches: tensors; sequences that give as many inputs as the example has, and labels after them; or
            dicts of inputs, whose other keys are ignored.
        batches: largest number of batches to read; None: all.

    Returns:
        `qmodel` itself.

    Raises:
        CalibrationError: the model has no quantizers, the loader is empty, a batch does not fit the example, a tensor
            was never reached, or a tensor held NaN or infinity; the message names it. Earlier ranges are restored.
    """
    inside = unwrapped(qmodel)
    if not quantizers(inside):
        raise CalibrationError(
            f"This {type(inside).__name__} has no quantizers, so there is no range to set. Make a quantized model with "
            "halfeven.prepare(model, example) first."
        )
    found = [q for q in quantizers(inside).values() if not q.state.fixed]
    norms = trained_batchnorms(inside)
    with (
        _ranges_restored_after_errors(found),
        evaluating(inside),
        progress("Calibrating", count_of(loader, batches)) as advance,
    ):
        given = advancing(read_inputs(inside, loader, batches), advance)
        # An iterator gives its first batch once: it is kept for the comparison of both modes, and calibrates after it.
        first = list(islice(given, 1))
        clipped = _clipped_in_training(inside, found, first, norms) if norms and first else {}
        _set_ranges(inside, found, chain(first, given), norms if clipped else [])
    if clipped:
        warn_of_unsettled(clipped, len([q for q in quantizers(inside).values() if not q.weight]))
    return qmodel


@contextmanager
def _ranges_restored_after_errors(found: list[Quantizer]) -> Iterator[None]:
    """Give quantizers that are being calibrated their earlier ranges again where an error ends the calibration."""
    # Only quantizers change in a calibration, so that their tensors are all there is to restore.
    before = {q: {k: v.clone() for k, v in q.state_dict().items()} for q in found}
    try:
        yield
    # Ctrl-C too: an interrupted calibration must not leave observers behind.
    except BaseException:
        for quantizer in found:
            quantizer.mode = Mode.QUANTIZE
            quantizer.observer = None
            quantizer.load_state_dict(before[quantizer])
        raise


def _set_ranges(qmodel: nn.Module, found: list[Quantizer], batches: Iterable[Inputs], norms: list[Any]) -> None:
    """Set ranges from batches in eval mode, and from the same batches normalized by the batch in these BatchNorms."""
    for quantizer in found:
        quantizer.start_calibration()
    # A weight's quantizer sets its range at its first call and quantizes from then on (`Quantizer._observe`), so the
    # activations that observers see are those of quantized weights.
    if norms:
        # Batch by batch in both modes, since an iterator gives each batch once.
        for inputs in batches:
            _run_batches(qmodel, [inputs])
            with normalizing_by_batch(norms):
                _run_batches(qmodel, [inputs])
    else:
        _run_batches(qmodel, batches)
    for quantizer in found:
        quantizer.finish_calibration()


def _clipped_in_training(
    qmodel: nn.Module, found: list[Quantizer], first: list[Inputs], norms: list[Any]
) -> dict[str, float]:
    """Return the activations of which ranges of eval mode would clip too large a share in training, with the share.

    One batch is enough to tell; one sample is not, since it may have a single value for a channel.
    """
    if min((len(x) for x in tensors_of(first[0]) if x.ndim), default=0) < 2:
        return {}
    # Ranges of this batch alone, for the comparison; `calibrate` then sets them anew from all batches.
    _set_ranges(qmodel, found, first, [])
    with normalizing_by_batch(norms), counting_clipped(qmodel) as counts:
        _run_batches(qmodel, first)
    return counts.excessive()


def run_batches(qmodel: nn.Module, loader: Iterable[Any], batches: int | None = None) -> None:
    """Run batches through a model in its present mode, for hooks and observers to see the tensors.

    Raises:
        CalibrationError: the loader is empty, or a batch does not fit the example that the model was prepared with.
    """
    _run_batches(qmodel, read_inputs(qmodel, loader, batches))


def _run_batches(qmodel: nn.Module, batches: Iterable[Inputs]) -> None:
    count = 0
    for inputs in batches:
        args, kwargs = on_device(qmodel, inputs)
        with computing_batch(count, inputs):
            qmodel(*args, **kwargs)
        count += 1
    if not count:
        raise CalibrationError(
            "Calibration got no batch, so no range can be set. Give a loader with at least one batch (an iterator that "
            "was used up before looks empty), and batches= of at least 1."
        )


@checked_arguments(CalibrationError)
@torch.no_grad()
def set_weight_ranges(qmodel: nn.Module, *, missing_only: bool = False) -> None:
    """Set the ranges of weights as `calibrate` does, without data; ranges of activations stay.

    Args:
        qmodel: a model from `prepare`.
        missing_only: keep ranges that are set already.

    Raises:
        CalibrationError: a weight holds NaN or infinity, or is not used; the message names it. Earlier ranges are
            restored.
    """
    found = [q for q in quantizers(qmodel).values() if q.weight and not q.state.fixed]
    found = [q for q in found if not (missing_only and q.state.has_range)]
    with float_function(qmodel), _ranges_restored_after_errors(found):
        for quantizer in found:
            quantizer.start_calibration()
        # Quantizers see the weights when the layers are called; the numbers of the example do not matter.
        run_example(qmodel)
        for quantizer in found:
            quantizer.finish_calibration()
