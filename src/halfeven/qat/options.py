"""The steps that accompany the training of a quantized model, and their options."""

from dataclasses import dataclass, field
from typing import Literal

from halfeven.errors import ConfigError
from halfeven.options import Options, Switch
from halfeven.qat.bit_schedule import ProgressionOptions
from halfeven.qat.distillation import DistillationOptions
from halfeven.qat.ema import AveragingOptions
from halfeven.qat.oscillation import OscillationOptions


@dataclass(frozen=True, kw_only=True)
class QATOptions(Options):
    """The steps of quantization-aware training, each of which can be switched.

    "auto" leaves a step to the recipe, which chooses by the bits and prints each choice with its reason.
    """

    equalize: Switch = "auto"
    """Cross-layer equalization of the start, which needs BatchNorm folded: channels get equal weight ranges."""
    start: Literal["auto", "ranges", "layers", "blocks"] = "auto"
    """Start of the training: calibrated ranges alone, or learned rounding of layers (AdaRound) or of blocks."""
    distill: Switch = "auto"
    """Distillation: the float model's outputs are labels too."""
    average: Switch = "auto"
    """A moving average of the weights is validated beside the weights, and the better of the two is kept."""
    freeze_oscillations: Switch = "auto"
    """Weights that hop between two integers are frozen."""
    dampen_oscillations: Switch = "auto"
    """A term of the loss pulls weights towards their integers."""
    progress: Switch = "auto"
    """Training starts with more bits."""
    distillation: DistillationOptions = field(default_factory=lambda: DistillationOptions(weight=1.0))
    """Options of distillation."""
    averaging: AveragingOptions = field(default_factory=lambda: AveragingOptions(decay=0.99))
    """Options of the moving average of the weights."""
    oscillation: OscillationOptions = field(default_factory=lambda: OscillationOptions(dampening=0.1))
    """Options for finding, freezing and dampening oscillations."""
    progression: ProgressionOptions = field(default_factory=ProgressionOptions)
    """Options of the stages with more bits that training starts with."""

    def __post_init__(self) -> None:
        if self.progress == "on" and self.start in ("layers", "blocks"):
            raise ConfigError(
                f'qat.start="{self.start}" would have no effect: with qat.progress="on" training starts with more '
                "bits, for which a rounding that is learned for the last bits means nothing. Leave qat.start out, or "
                'set qat.progress="off".'
            )
