"""Collect what TensorBoard shows of quantizers as histograms: their scales, and the shares that they clip."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Quantizer


def histograms(qmodel: nn.Module, clipped: Iterable[float]) -> dict[str, Tensor]:
    """Return log2 of the scales of weights and of activations, and the clipped shares in percent, by name.

    Names without values are left out.

    Args:
        qmodel: the model.
        clipped: the clipped share of each activation.
    """
    found = {"clipped share of activations, %": torch.tensor([100 * share for share in clipped])}
    ranged = [quantizer for quantizer in quantizers(qmodel).values() if quantizer.state.has_range]
    for weight, name in ((True, "weights"), (False, "activations")):
        scales = [_present_scale(quantizer).flatten() for quantizer in ranged if quantizer.weight is weight]
        found[f"log2 of the scales of {name}"] = torch.cat(scales).log2() if scales else torch.empty(0)
    return {name: values for name, values in found.items() if values.numel()}


def _present_scale(quantizer: Quantizer) -> Tensor:
    # The range of an observed weight is that of the last training step.
    observed = quantizer.weight and quantizer.state.observing
    return (quantizer.scale if observed else quantizer.used_scale(quantizer.scale)).detach().float().cpu()
