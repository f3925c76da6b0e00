"""The model and its loss as a single module, which Accelerate wraps and each training step runs."""

from typing import Any

import torch
from torch import Tensor, nn

from halfeven.graph.batches import run_on
from halfeven.graph.torch_private import pytree
from halfeven.tasks import Task
from halfeven.training.callback import TrainerCallback


class Objective(nn.Module):
    """Model and loss together: Accelerate wraps this module for mixed precision and DDP, and never the model itself.

    Args:
        model: the model.
        task: gives the loss.
        label_smoothing: for the task's loss.
        callback: adds to the loss.
        channels_last: give the model images with the channels last in memory.
        compiled: run the model compiled as a whole.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        label_smoothing: float,
        callback: TrainerCallback,
        *,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.label_smoothing = label_smoothing
        self.callback = callback
        self.channels_last = channels_last
        # In a tuple, since a submodule would have the model's parameters under further names.
        self._compiled = (torch.compile(model),) if compiled else ()

    def forward(self, inputs: Any, targets: Any) -> Tensor:
        if self.channels_last:
            inputs = pytree.tree_map_only(Tensor, _with_channels_last, inputs)
        outputs = run_on(self._runnable(), inputs)
        task_loss = self.task.loss(outputs, targets, self.label_smoothing)
        return self.callback.loss(outputs, inputs, targets, task_loss)

    def _runnable(self) -> Any:
        # Compiled code has the hooks that were there when it was compiled, and no others.
        return self._compiled[0] if self._compiled and not self.callback.has_passing_hooks else self.model

    def run_uncompiled(self) -> None:
        """Run the model as it is from now on, with all hooks."""
        self._compiled = ()


def _with_channels_last(x: Tensor) -> Tensor:
    """Return a batch of images with the channels last in memory; any other tensor as it is."""
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 and x.is_floating_point() else x
