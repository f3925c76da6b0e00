"""Every output of a model: its name, and its difference between the file and the simulations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfeven.deployment.file_interface import OUTPUT
from halfeven.errors import VerificationError
from halfeven.graph.model_inputs import path_names
from halfeven.graph.torch_private import pytree


@dataclass(frozen=True)
class OutputParity:
    """The comparison of one output: the file against the exact simulation and against the float simulation."""

    name: str
    """Its name in a file that was given no other names: "logits", "output_0", "boxes_1"."""
    count: int
    equal: float
    """Share of the values that equal the exact simulation's to the last bit."""
    difference: float
    """Largest difference from the exact simulation, over the largest absolute value of the simulation."""
    rms_difference: float
    """Root mean square of that difference, over that of the float simulation."""
    float_simulation_difference: float
    """The same for the float simulation, which is what was trained."""
    float_simulation_difference_alone: float
    """The same where the float simulation is given the runtime's own integers before it."""
    quantization_error: float
    """The same between the float simulation and the model with its quantizers off: what quantization itself costs."""
    continuous: bool
    """The output holds real numbers, not indices or masks."""
    moved_by_quantization: float
    """Share of the values that differ between the float simulation and the model with its quantizers off."""


def named_outputs(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors of a model's outputs by their names in its file, in the order in which the file has them."""
    leaves = pytree.tree_leaves(outputs)
    pairs = zip(path_names(outputs, OUTPUT), leaves, strict=True)
    return {name: leaf for name, leaf in pairs if isinstance(leaf, Tensor)}


class OutputSums:
    """Counts of an output over all batches."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.equal = 0
        self.moved = 0
        self.largest_difference = 0.0
        self.largest = 0.0
        self.continuous = True
        self.squares = {"exact": 0.0, "simulated": 0.0, "alone": 0.0, "quantization": 0.0, "signal": 0.0}

    def add(self, found: Tensor, exact: Tensor, simulated: Tensor, alone: Tensor, floating: Tensor) -> None:
        """Count one batch.

        Args:
            found: the file's output.
            exact: the exact simulation's.
            simulated: the float simulation's.
            alone: the same, computed from the file's own integers.
            floating: that of the model with its quantizers off.
        """
        # Indices and masks have no size of error: their share of equal values is reported.
        self.continuous = self.continuous and exact.is_floating_point()
        differences = _differences(found, exact)
        self.count += found.numel()
        self.equal += int((differences == 0).sum())
        self.largest_difference = max(self.largest_difference, _largest_value(differences))
        self.largest = max(self.largest, _largest_value(_finite_double(exact).abs()))
        self.squares["exact"] += _sum_of_squares(differences)
        self.squares["simulated"] += _sum_of_squares(_differences(found, simulated))
        self.squares["alone"] += _sum_of_squares(_differences(found, alone))
        by_quantization = _differences(simulated, floating)
        self.moved += int((by_quantization > 0).sum())
        self.squares["quantization"] += _sum_of_squares(by_quantization)
        self.squares["signal"] += _sum_of_squares(_finite_double(simulated))

    def result(self) -> OutputParity:
        return OutputParity(
            name=self.name,
            count=self.count,
            equal=self.equal / self.count if self.count else 1.0,
            difference=self.largest_difference / (self.largest or 1.0),
            rms_difference=self._relative_error("exact"),
            float_simulation_difference=self._relative_error("simulated"),
            float_simulation_difference_alone=self._relative_error("alone"),
            quantization_error=self._relative_error("quantization"),
            continuous=self.continuous,
            moved_by_quantization=self.moved / self.count if self.count else 0.0,
        )

    def _relative_error(self, which: str) -> float:
        # An output of zeros has no size to compare with: the difference itself is returned.
        return math.sqrt(self.squares[which] / (self.squares["signal"] or 1.0))


def in_form_of(expected: dict[str, Tensor], found: Sequence[Tensor], path: Any) -> dict[str, Tensor]:
    """Return a file's outputs by the names of the simulation's.

    Raises:
        VerificationError: another number of outputs, or another shape.
    """
    if len(found) != len(expected):
        raise VerificationError(
            f"{path} has {len(found)} outputs and the model {len(expected)} ({', '.join(expected)}), so it was not "
            "written from this model. Export the model again, then verify."
        )
    named = dict(zip(expected, found, strict=True))
    for name, output in named.items():
        if output.shape != expected[name].shape:
            raise VerificationError(
                f'The output "{name}" of {path} has shape {list(output.shape)}, and that of the model '
                f"{list(expected[name].shape)}, so the file was not written from this model, or for inputs of another "
                "size. Export the model again, then verify."
            )
    return named


def _differences(a: Tensor, b: Tensor) -> Tensor:
    """Return the absolute differences of two tensors, in float64.

    They are 0 where both hold the same value, NaN included, and infinite where one tensor alone is NaN or infinite.
    """
    a = a.cpu().double()
    b = b.cpu().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf))


def _finite_double(x: Tensor) -> Tensor:
    return x.cpu().double().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def _largest_value(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _sum_of_squares(x: Tensor) -> float:
    return float(x.square().sum())
