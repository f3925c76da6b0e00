"""Several optimizers as a single one, each with parameters of its own: SGD for weights and Adam for scales, say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class JoinedOptimizers(torch.optim.Optimizer):
    """Steps several optimizers as one.

    It has their parameter groups, in their order, and one state, so that its state dict is that of a single optimizer.

    Args:
        parts: optimizers of different parameters, which have taken no step.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let the parts work on the groups and on the state of this optimizer."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups = self.param_groups[start:end]
            part.state = self.state
            start = end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an optimizer that was joined of the same parts."""
        super().load_state_dict(state_dict)
        self._share()  # loading replaces groups and state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a step with each of the optimizers."""
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss
