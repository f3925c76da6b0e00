"""Progressive bit-width: training starts with more bits and goes down to those of the plan, stage by stage.

Zhuang et al., "Towards Effective Low-bitwidth Convolutional Neural Networks" (arXiv 1711.00205); Park and Yoo, "PROFIT"
(arXiv 2008.04693), which goes from 8 over 5 to 4 bits.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import nn

from halfeven.errors import ConfigError
from halfeven.layerwise.calibrate import calibrate
from halfeven.options import Options, above, below
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.scheme import Bits
from halfeven.renamed import renamed_attributes


@dataclass(frozen=True, kw_only=True)
class ProgressionOptions(Options):
    """The stages before the plan's own bits.

    Raises:
        ConfigError: stages whose bits do not decrease, or no time for them.
    """

    bits: tuple[Bits, ...] = (8, 6)
    """Bits of the stages, in their order; a tensor for which the plan has as many or more keeps the plan's."""
    share: Annotated[float, above(0), below(1)] = 0.3
    """Share of the run that all stages take together, in equal parts."""

    def __post_init__(self) -> None:
        decrease = all(a > b for a, b in zip(self.bits, self.bits[1:], strict=False))
        if not (self.bits and decrease):
            raise ConfigError(
                f"qat.progression.bits={self.bits} does not lead to fewer bits. The bits must decrease, such as (8, 6)."
            )


class BitSchedule:
    """Sets the bits of a model's quantizers by the fraction of the run that is done.

    Args:
        qmodel: a calibrated model from `prepare`.
        options: bits of the stages, and their fraction of the run.
        loader: calibration batches, as `calibrate` takes them: other bits need other ranges.
    """

    def __init__(self, qmodel: nn.Module, options: ProgressionOptions, loader: Iterable[Any]) -> None:
        self.qmodel = qmodel
        self.options = options
        self.loader = loader
        self.planned = {quantizer: quantizer.scheme for quantizer in quantizers(qmodel).values()}
        self.stage = len(options.bits)
        """Number of the stage whose bits are set; the last stage has the plan's bits."""

    def before_step(self, model: nn.Module, done: float) -> None:
        """Set the bits of the stage that is due, and calibrate where the stage is new."""
        stages = len(self.options.bits)
        # The stages share `share` of the run in equal parts; from its end on the number is `stages`, for the plan's own
        # bits.
        early = done < self.options.share
        stage = min(int(done / self.options.share * stages), stages - 1) if early else stages
        if stage != self.stage:
            self._set_stage(stage)
            # A grid with fewer integers needs a larger scale for the same range. This happens once for each stage.
            calibrate(self.qmodel, self.loader)

    @property
    def is_over(self) -> bool:
        """Return True where all quantizers have the plan's bits."""
        return self.stage == len(self.options.bits)

    def _set_stage(self, stage: int) -> None:
        self.stage = stage
        # The last stage has no bits of its own: 0 leaves every tensor at those of the plan.
        least = (*self.options.bits, 0)[stage]
        for quantizer, scheme in self.planned.items():
            # Scale and zero point keep their shapes, so that optimizer and state dict are not touched.
            quantizer.scheme = dataclasses.replace(scheme, bits=max(scheme.bits, least))

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the stage."""
        return {"stage": torch.tensor(self.stage)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the bits of a stage that `state_dict` returned; the ranges come with the model's state."""
        self._set_stage(int(state["stage"]))


__getattr__ = renamed_attributes(__name__, Progression="qat.bit_schedule.BitSchedule")
