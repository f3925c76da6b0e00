"""One run of an exact simulation: its settings, its tensors, and the integers that it computed."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass
class Simulation:
    """One run, shared by all regions of a model."""

    codes: dict[str, Tensor] = field(default_factory=dict)
    """The integers of every quantizer by its name, from 0 upwards, as they were computed."""

    given: dict[str, Tensor] = field(default_factory=dict)
    """Integers that replace the computed ones, so that each layer can be compared alone."""

    watched: bool = False
    """Simulate the file in which every quantized tensor is an output. Some of its operators are not fused, and round
    otherwise."""

    watching_matters: bool = False
    """True where the last run has integers that differ between the watched file and the file as users run it."""

    half: bool = False
    """Simulate a file with float16 in place of float32: each result is rounded to float16."""

    file: Path | None = None
    """The file that is simulated, where there is one."""

    inputs: Sequence[Any] = ()
    """The model's inputs, in the file's order."""

    tensors: "dict[str, Simulated]" = field(default_factory=dict)
    """The tensors behind the quantizers, by name, as the next operators read them."""

    def begin(self, inputs: Sequence[Any] = ()) -> None:
        """Forget the last run; the next reads these inputs."""
        self.codes.clear()
        self.tensors.clear()
        self.inputs = inputs
        self.watching_matters = False

    def choose(self, watched: Tensor, used: Tensor) -> Tensor:
        """Return the integers of the simulated file: the watched one, or the file as users run it."""
        self.watching_matters |= not torch.equal(watched, used)
        return watched if self.watched else used

    def keep(self, quantizer: str, codes: Tensor) -> Tensor:
        """Keep the computed integers of a quantizer, and return those that the next operator reads."""
        self.codes[quantizer] = codes
        return self.given.get(quantizer, codes)


class Simulated(ABC):
    """A tensor in a form that a runtime keeps between two quantizers: more is known of it than its real values."""

    @abstractmethod
    def real(self) -> Tensor:
        """Return the real values."""


def is_simulated(value: Any) -> bool:
    """Return True for a tensor in a runtime's own form."""
    return isinstance(value, Simulated)


def real_values(value: Any) -> Any:
    """Return the real values of a tensor in a runtime's own form; any other value as it is."""
    return value.real() if isinstance(value, Simulated) else value
