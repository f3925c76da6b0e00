"""What the interpreters of an exact simulation have in common: what a run is told, and what it leaves."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Simulation:
    """One run, shared by all regions of a model."""

    levels: dict[str, Tensor] = field(default_factory=dict)
    """The integers of every quantizer by its name, from 0 upwards, as they were computed."""

    given: dict[str, Tensor] = field(default_factory=dict)
    """Integers to go on with in place of those that were computed, so that each layer can be compared alone."""

    watched: bool = False
    """Whether the file is simulated whose quantized tensors are all outputs. Some of its operators are not fused, and
    round otherwise."""

    watching_matters: bool = False
    """Whether integers of the last run are others in the file that is not watched, or the other way round."""

    def begin(self) -> None:
        """Forget the last run."""
        self.levels.clear()
        self.watching_matters = False

    def choose(self, watched: Tensor, used: Tensor) -> Tensor:
        """The integers of the file that is simulated: of the watched one, or of the one as it is used."""
        self.watching_matters |= not torch.equal(watched, used)
        return watched if self.watched else used

    def keep(self, quantizer: str, levels: Tensor) -> Tensor:
        """Keep the computed integers of a quantizer; those to go on with."""
        self.levels[quantizer] = levels
        return self.given.get(quantizer, levels)
