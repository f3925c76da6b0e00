"""The model and its loss as a single module, which Accelerate wraps and each training step runs."""

from typing import Any

from torch import Tensor, nn

from halfeven.graph.batches import run_on
from halfeven.tasks import Task
from halfeven.training.callback import TrainerCallback


class Objective(nn.Module):
    """Model and loss together: Accelerate wraps this module for mixed precision and DDP, and never the model itself."""

    def __init__(self, model: nn.Module, task: Task, label_smoothing: float, callback: TrainerCallback) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.label_smoothing = label_smoothing
        self.callback = callback

    def forward(self, inputs: Any, targets: Any) -> Tensor:
        outputs = run_on(self.model, inputs)
        task_loss = self.task.loss(outputs, targets, self.label_smoothing)
        return self.callback.loss(outputs, inputs, targets, task_loss)
