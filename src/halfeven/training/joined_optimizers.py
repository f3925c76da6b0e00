"""Join several optimizers into one, each with its own parameters: SGD for weights and Adam for scales, for example."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class JoinedOptimizers(torch.optim.Optimizer):
    """Steps several optimizers together, as a single optimizer.

    It holds the parameter groups of all parts, in the order of the parts, and their common state. Schedulers, gradient
    scalers and checkpoints therefore see an ordinary optimizer: its `state_dict` has the form of a single optimizer's,
    with the groups of all parts. A change of a group, such as a scheduler's new learning rate, reaches its part.

    Args:
        parts: optimizers of disjoint sets of parameters, none of which has taken a step yet.

    Raises:
        ValueError: a parameter belongs to several parts.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        # No defaults, since each group has all settings of its part already.
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share_state()

    def _share_state(self) -> None:
        """Give each part its groups and the state of this optimizer: the same objects, not copies."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            # One state serves all parts: its keys are parameters, of which no two parts have the same.
            part.param_groups = self.param_groups[start:end]
            part.state = self.state
            start = end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer with the same parts in the same order.

        Args:
            state_dict: what `state_dict` of that optimizer returned.

        Raises:
            ValueError: the number of groups, or of parameters in a group, differs.
        """
        super().load_state_dict(state_dict)
        self._share_state()  # loading has made new groups and a new state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a step of each part, in their order.

        Args:
            closure: computes the loss and its gradients; called once, before the first part's step.

        Returns:
            The loss that the closure returned; None without a closure.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss
