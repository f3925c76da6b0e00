"""The interface of a task. Derive your own from `Task`, and name the function that returns it in `task.function`."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor
from torch.utils.data import default_collate

from halfeven.graph.torch_private import pytree

if TYPE_CHECKING:  # importing torchmetrics takes longer than importing torch, and few programs judge anything
    from torchmetrics import Metric, MetricCollection

Metrics = dict[str, float]
"""Metrics by name, in percent; more is better."""


def read_metrics(values: Mapping[str, float | None]) -> Metrics:
    """Return metrics that were read from JSON, where null stands for NaN."""
    return {name: math.nan if value is None else value for name, value in values.items()}


class Task(ABC):
    """The loss of a batch and the metrics of a data set. Outputs are those of the model, in its own structure."""

    key: str
    """The metric that decides which of several models is the best."""
    class_axis: int | Literal["auto"] = "auto"
    """Axis of an output over which the largest value is the model's answer; "auto": the last axis of tokens, and the
    second axis of everything else."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """Return the loss of a batch, [] in float32.

        Args:
            outputs: the model's, in training mode.
            targets: the data's, collated.
            label_smoothing: share of each label that is spread evenly over all classes.
        """

    @abstractmethod
    def metrics(self) -> "Metric | MetricCollection":
        """Return new metrics of torchmetrics, which are updated with the result of `judged`."""

    @abstractmethod
    def judged(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """Return predictions and targets of a batch, as the metrics take them."""

    def wrong_target(self, target: Any) -> str:
        """Say what is wrong with the target of a sample; "" where nothing is."""
        return ""

    def figures(self, computed: Mapping[str, Tensor]) -> Metrics:
        """Return the values that the metrics computed, in percent."""
        return {name: round(100 * float(value), 4) for name, value in computed.items()}

    def collate(self, items: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Return the inputs and the targets of a batch, from (input, target) pairs."""
        inputs, targets = default_collate(list(items))
        return inputs, targets

    def logits(self, outputs: Any) -> Tensor:
        """Return the logits of classes that exclude each other, [samples, ..., classes]; distillation compares them."""
        return first_tensor(outputs)


def first_tensor(outputs: Any) -> Tensor:
    """Return the first tensor of a model's outputs, in whatever structure they are."""
    found: Tensor = next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
    return found
