"""The steps that accompany the training of a quantized model, and their options."""

from dataclasses import dataclass, field
from typing import Literal

from halfeven.errors import ConfigError
from halfeven.options import Options, Switch
from halfeven.qat.bit_schedule import ProgressionOptions
from halfeven.qat.distillation import DistillationOptions
from halfeven.qat.ema import AveragingOptions
from halfeven.qat.oscillation import OscillationOptions

# By themselves the classes switch everything off.
DISTILLATION = DistillationOptions(weight=1.0)
AVERAGING = AveragingOptions(decay=0.99)
OSCILLATION = OscillationOptions(dampening=0.1)
PROGRESSION = ProgressionOptions()


@dataclass(frozen=True, kw_only=True)
class QATOptions(Options):
    """The steps of quantization-aware training, each of which can be switched.

    "auto" leaves a step to the recipe, which chooses by the bits and prints each choice with its reason.

    Raises:
        ConfigError: an option would have no effect.
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
    distillation: DistillationOptions = field(default_factory=lambda: DISTILLATION)
    """Options of distillation."""
    averaging: AveragingOptions = field(default_factory=lambda: AVERAGING)
    """Options of the moving average of the weights."""
    oscillation: OscillationOptions = field(default_factory=lambda: OSCILLATION)
    """Options for finding, freezing and dampening oscillations."""
    progression: ProgressionOptions = field(default_factory=lambda: PROGRESSION)
    """Options of the stages with more bits that training starts with."""

    def __post_init__(self) -> None:
        if self.progress == "on" and self.start in ("layers", "blocks"):
            raise ConfigError(
                f'qat.start="{self.start}" would have no effect: with qat.progress="on" training starts with more '
                "bits, for which a rounding that is learned for the last bits means nothing. Leave qat.start out, or "
                'set qat.progress="off".'
            )
        self._check_steps()
        self._check_parts()

    def _check_steps(self) -> None:
        """Raise ConfigError where a step is on, and its options leave nothing of it."""
        teaches = self.distillation.weight > 0 or bool(self.distillation.features)
        for switch, effective, wanted in (
            ("distill", teaches, "distillation.weight, or name layers in qat.distillation.features"),
            ("average", self.averaging.decay > 0, "averaging.decay"),
            ("dampen_oscillations", self.oscillation.dampening > 0, "oscillation.dampening"),
        ):
            if getattr(self, switch) == "on" and not effective:
                raise ConfigError(
                    f'qat.{switch}="on" would have no effect, because qat.{wanted.split(",")[0]} is 0. Set '
                    f"qat.{wanted}."
                )

    def _check_parts(self) -> None:
        """Raise ConfigError where options are given of a step that is left out, as "auto" leaves out these steps."""
        freezes = self.freeze_oscillations == "on"
        follows = freezes or self.dampen_oscillations == "on" or self.oscillation.track
        switched_off = self.freeze_oscillations == self.dampen_oscillations == "off"
        for part, given, effective, switch in (
            ("distillation", self.distillation != DISTILLATION, self.distill != "auto", "distill"),
            ("progression", self.progression != PROGRESSION, self.progress != "auto", "progress"),
            ("oscillation", self.oscillation != OSCILLATION, follows or switched_off, "freeze_oscillations"),
            ("oscillation.freeze", self.oscillation.freeze, freezes, "freeze_oscillations"),
        ):
            if given and not effective:
                raise ConfigError(
                    f"qat.{part} would have no effect, because the recipe takes this step only if it is switched on. "
                    f'Set qat.{switch}="on", or leave qat.{part} out.'
                )
