"""Measure the share of each activation's values that its quantizer clips, and warn where it is large."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.distributed import rank
from halfeven.errors import HalfevenWarning
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Mode, Quantizer

MAX_CLIPPED_SHARE = 0.2
"""Largest share of an activation's values that may lie outside of its range before a warning names it. Ranges of
settled models clip below a hundredth at 8 bits, and below a tenth at 2 bits."""

MAX_NAMED_ACTIVATIONS = 5
"""Activations that a warning names."""


@dataclass
class ClippedValues:
    """Counts of values, and of values outside of the range, by the quantizer's name."""

    seen: dict[str, int] = field(default_factory=dict)
    clipped: dict[str, Tensor] = field(default_factory=dict)

    def shares(self) -> dict[str, float]:
        """Return the clipped share of each activation, the largest first."""
        found = {name: float(count) / self.seen[name] for name, count in self.clipped.items()}
        return dict(sorted(found.items(), key=lambda row: -row[1]))

    def excessive(self) -> dict[str, float]:
        """Return the shares above `MAX_CLIPPED_SHARE`, the largest first."""
        return {name: share for name, share in self.shares().items() if share > MAX_CLIPPED_SHARE}


@contextmanager
def counting_clipped(qmodel: nn.Module) -> Iterator[ClippedValues]:
    """Count the clipped values of all activations with a range in the forward passes within the context."""
    counts = ClippedValues()
    found = {q.name or name: q for name, q in quantizers(qmodel).items() if not q.weight}
    handles = [q.register_forward_pre_hook(_counting_hook(name, counts)) for name, q in found.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _counting_hook(name: str, counts: ClippedValues) -> Any:
    @torch.no_grad()
    def count(quantizer: Quantizer, inputs: tuple[Any, ...]) -> None:
        if quantizer.mode is not Mode.QUANTIZE or not quantizer.state.has_range:
            return
        x = inputs[0].detach()
        if len(inputs) > 1:  # the bounds of an activation that is fused into the quantizer
            x = x.clamp(*inputs[1])
        scale = quantizer.used_scale(x)
        zero_point = quantizer.used_zero_point()
        # What rounds to an end of the range is not clipped.
        low = (quantizer.scheme.quant_min - zero_point - 0.5) * scale
        high = (quantizer.scheme.quant_max - zero_point + 0.5) * scale
        outside = ((x < low) | (x > high)).sum()
        counts.clipped[name] = counts.clipped[name] + outside if name in counts.clipped else outside
        counts.seen[name] = counts.seen.get(name, 0) + x.numel()

    return count


def clipping_sentence(shares: Mapping[str, float], activations: int) -> str:
    """Return a sentence that names the activations of the largest shares.

    Args:
        shares: clipped shares by name, the largest first.
        activations: number of the model's quantized activations.
    """
    named = ", ".join(f"{name} ({share:.0%})" for name, share in list(shares.items())[:MAX_NAMED_ACTIVATIONS])
    more = " and more" if len(shares) > MAX_NAMED_ACTIVATIONS else ""
    return (
        f"{len(shares)} of {activations} quantized activations clip more than {MAX_CLIPPED_SHARE:.0%} of their values "
        f"in training, {named}{more}"
    )


def warn_of_unsettled(shares: Mapping[str, float], activations: int) -> None:
    """Warn that BatchNorm's running statistics do not describe the calibration batches.

    Args:
        shares: shares that ranges of eval mode would clip in training, by name, the largest first.
        activations: number of the model's quantized activations.
    """
    warnings.warn(
        f"BatchNorm's running statistics do not describe the calibration batches: with ranges of eval mode, "
        f"{clipping_sentence(shares, activations)}. The ranges were therefore set from both modes, eval and training, "
        "and are wider than either needs. Train the float model longer, raise BatchNorm's momentum, or settle the "
        "statistics with halfeven.layerwise.re_estimate.re_estimate(qmodel, loader) and calibrate again.",
        HalfevenWarning,
        stacklevel=3,
    )


class ClippingWatch:
    """Warns once of each activation that training clips too much.

    Counting doubles the time of a step, so only the steps that `due` announces count: the first, and each step after a
    validation.
    """

    def __init__(self, qmodel: nn.Module) -> None:
        self.qmodel = qmodel
        self.due = True
        self.named: set[str] = set()
        self.shares: dict[str, float] = {}
        """Clipped share of each activation in the step that was counted last, by name."""
        self._context: Any = None

    @property
    def counting(self) -> bool:
        """Return True in a step that counts."""
        return self._context is not None

    def before_step(self) -> None:
        """Start to count, where it is due."""
        if self.due and self._context is None:
            # Entered by hand, since a step of training lies between two calls of this object.
            self._context = counting_clipped(self.qmodel)
            self._counts = self._context.__enter__()

    def after_step(self) -> None:
        """Warn of the activations that clipped too much since `before_step`."""
        if self._context is None:
            return
        self._context.__exit__(None, None, None)
        self._context = None
        self.due = False
        shares = self.shares = self._counts.shares()
        new = {name: share for name, share in self._counts.excessive().items() if name not in self.named}
        self.named.update(new)
        if new and rank() == 0:
            warnings.warn(
                f"{clipping_sentence(new, len(shares))}. No gradient passes what is clipped, so the layers before "
                "learn little. Calibrate with batches of the training data, transformed as in training; if BatchNorm's "
                "running statistics do not describe these batches yet, train the float model longer first, or call "
                "halfeven.layerwise.re_estimate.re_estimate(qmodel, loader) and calibrate again.",
                HalfevenWarning,
                stacklevel=3,
            )
