"""The quantizers of a model: find them, and switch them all at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import CalibrationError, PlacementError
from halfeven.quantization.quantizer import Mode, Quantizer


@checked_arguments(PlacementError)
def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return all quantizers of a model by module name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


def has_quantized_weight(module: object) -> bool:
    """Return True for a layer that reads its weight through a quantizer, in training or as it is deployed."""
    return hasattr(module, "weight_quantizer")


@checked_arguments(CalibrationError)
def set_observing(model: nn.Module, on: bool) -> None:
    """Switch on or off that training batches move the observed ranges of a model."""
    for quantizer in quantizers(model).values():
        quantizer.set_observing(on)


@contextmanager
def weights_quantized_once(model: nn.Module) -> Iterator[None]:
    """Quantize each weight once, at its first use within the context: for the batches of a step, or an evaluation.

    Gradients are the same as without. Weights and scales must not change meanwhile.
    """
    found = [q for q in quantizers(model).values() if q.weight]
    for quantizer in found:
        quantizer.caches_output = True
    try:
        yield
    finally:
        for quantizer in found:
            quantizer.caches_output = False
            quantizer.cached = None


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Set the mode of all quantizers of a model, for example `Mode.FLOAT` to run the model without quantization."""
    for quantizer in quantizers(model).values():
        quantizer.mode = mode
