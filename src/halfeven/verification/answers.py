"""The answers of a model: the largest value over the classes of an output, and the labels that judge it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from halfeven.errors import named

ClassAxis = int | Literal["auto"]
"""Axis of an output whose largest value is an answer; "auto": the last axis of tokens, else the second axis."""


@dataclass
class Answers:
    """The answers of all batches, counted: the file's that equal the simulations', and those that are right."""

    axis: ClassAxis = "auto"
    total: int = 0
    same_exact: int = 0
    same_float: int = 0
    labelled: int = 0
    ignored: int = 0
    """Labels that are no class: padding, or the border of a segmentation."""
    unlabelled: int = 0
    """Batches without labels."""
    judged: str = ""
    """Name of the output that the labels judge."""
    reasons: list[str] = field(default_factory=list)
    """Why labels could not be used."""
    right: dict[str, int] = field(default_factory=dict)

    def add(self, outputs: Mapping[str, Mapping[str, Tensor]], labels: Any) -> None:
        """Count one batch.

        Args:
            outputs: "deployed", "exact", "simulated" and, where there is a float model, "float": outputs by name.
            labels: of the batch; None where it has none.
        """
        name, axis = self._judged_output(outputs["deployed"], labels)
        choices = {model: answer(found[name], axis) for model, found in outputs.items()}
        self.total += choices["deployed"].numel()
        self.same_exact += int((choices["deployed"] == choices["exact"]).sum())
        self.same_float += int((choices["deployed"] == choices["simulated"]).sum())
        if labels is None:
            self.unlabelled += 1
            return
        if not self.judged:
            return
        labels = labels.cpu()
        classes = math.inf if axis is None else outputs["deployed"][name].shape[axis]
        # A label outside of the classes, such as -100 for padding or 255 for a border, judges nothing.
        counted = (labels >= 0) & (labels < classes)
        self.labelled += int(counted.sum())
        self.ignored += int((~counted).sum())
        for model in ("float", "simulated", "deployed"):
            if model in choices:
                right = int(((choices[model] == labels) & counted).sum())
                self.right[model] = self.right.get(model, 0) + right

    def note_unread(self, entries: Sequence[Any]) -> None:
        """Note the entries of a batch without labels that are no inputs: one may be a label under another name."""
        if entries:
            self._add_reason(
                f"no accuracy: none of the batch's entries that are no inputs ({named(entries)}) is called label, "
                "target or y"
            )

    def accuracy(self) -> dict[str, float]:
        """Return the accuracies in percent by model; empty where no label could be used."""
        return {name: 100 * count / self.labelled for name, count in self.right.items()} if self.labelled else {}

    def notes(self) -> list[str]:
        """Return the limits of the accuracies, or the reason why there are none."""
        found = list(self.reasons)
        if self.right and self.unlabelled:
            found.append(f"accuracies leave out {self.unlabelled} batches without labels")
        if self.right and self.ignored:
            found.append(f"accuracies leave out {self.ignored} labels that are no class of the output")
        return found

    def _judged_output(self, outputs: Mapping[str, Tensor], labels: Any) -> tuple[str, int | None]:
        """Return the output that answers, and its axis of classes: where there are labels, the first that they fit."""
        first = next((name for name, output in outputs.items() if output.numel()), next(iter(outputs)))
        default = (first, class_axis(outputs[first], self.axis))
        if labels is None:
            return default
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            self._add_reason(f"no accuracy: the labels are {_label_words(labels)}, not a tensor of indices of classes")
            return default
        for name, output in outputs.items():
            if labels.shape == output.shape and not output.is_floating_point():
                self.judged = name
                return name, None  # indices of classes already
            if (axis := _fitting_axis(output, labels, self.axis)) is not None:
                self.judged = name
                return name, axis
        self._add_reason(_misfit_text(outputs, labels))
        return default

    def _add_reason(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


def class_axis(output: Tensor, given: ClassAxis) -> int:
    """Return the axis of the classes: `given`, or for "auto" the last of three axes and else the second.

    Three axes are those of tokens, [samples, tokens, classes].
    """
    if given != "auto":
        return given
    return -1 if output.ndim == 3 else 1


def answer(output: Tensor, axis: int | None) -> Tensor:
    """Return the index of the largest value over an axis; an output without such an axis is its own answer, rounded.

    Of a single value, as a model with one logit has, the index would always be 0; of none there is none.
    """
    output = output.cpu().float()
    if axis is None or output.ndim < 2 or not -output.ndim <= axis < output.ndim or output.shape[axis] < 2:
        return output.round()
    return output.argmax(axis)


def _fitting_axis(output: Tensor, labels: Tensor, given: ClassAxis) -> int | None:
    """Return the axis of an output that labels do not have; None where their shapes differ in more than that.

    An axis of a single value holds no classes to choose from.
    """
    if labels.ndim != output.ndim - 1:
        return None
    usual = class_axis(output, given) % output.ndim
    for axis in [usual] if given != "auto" else [usual, *range(1, output.ndim)]:
        if output.shape[axis] > 1 and _shape_without(output, axis) == labels.shape:
            return axis
    return None


def _shape_without(output: Tensor, axis: int) -> torch.Size:
    return torch.Size([size for place, size in enumerate(output.shape) if place != axis])


def _misfit_text(outputs: Mapping[str, Tensor], labels: Tensor) -> str:
    """Return why integer labels judge none of the outputs."""
    for name, output in outputs.items():
        if output.is_floating_point() and output.squeeze().shape == labels.squeeze().shape:
            return (
                f'no accuracy: the output "{name}" has a single value for each label, and what value separates the '
                "classes is not known"
            )
    shapes = ", ".join(f"{name} {list(output.shape)}" for name, output in outputs.items())
    return f"no accuracy: labels of shape {list(labels.shape)} fit no output without its classes ({shapes})"


def _label_words(labels: Any) -> str:
    if isinstance(labels, Tensor):
        return f"{str(labels.dtype).removeprefix('torch.')} of shape {list(labels.shape)}"
    return f"a {type(labels).__name__}"
