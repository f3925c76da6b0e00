"""The interface of a task. Derive from `Task` for one of your own, and name it in `task.function`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

if TYPE_CHECKING:  # importing torchmetrics takes longer than importing torch, and few programs judge anything
    from torchmetrics import Metric, MetricCollection

Metrics = dict[str, float]
"""Figures by name, in percent; more is better."""


class Task(ABC):
    """The loss of a batch, and what is measured on a data set. Outputs are whatever the model returns."""

    key: str
    """The metric that decides which of several models is the best."""
    class_axis: int = 1
    """Axis of the first output over which the largest value is the model's answer."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Any, label_smoothing: float = 0.0) -> Tensor:
        """The loss of a batch, [] in float32.

        Args:
            outputs: what the model gave, in training mode.
            targets: what the data gives beside the inputs, collated.
            label_smoothing: share of each label that goes to all classes alike.
        """

    @abstractmethod
    def metrics(self) -> "Metric | MetricCollection":
        """New metrics of torchmetrics, which `judged` feeds."""

    @abstractmethod
    def judged(self, outputs: Any, targets: Any) -> tuple[Any, Any]:
        """Predictions and targets of a batch, as the metrics take them."""

    def figures(self, computed: Mapping[str, Tensor]) -> Metrics:
        """What the metrics computed, in percent."""
        return {name: round(100 * float(value), 4) for name, value in computed.items()}

    def collate(self, items: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
        """A batch of (input, target) pairs."""
        inputs, targets = default_collate(list(items))
        return inputs, targets

    def logits(self, outputs: Any) -> Tensor:
        """Logits of classes that exclude each other, [samples, ..., classes]: what a teacher's soft labels are of."""
        return first_tensor(outputs)


def first_tensor(outputs: Any) -> Tensor:
    """The first tensor of a model's outputs, whatever holds them."""
    found: Tensor = next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
    return found
