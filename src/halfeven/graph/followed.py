"""A forward with something behind it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn


def followed(forward: Callable[..., Any], after: Callable[[Any], None]) -> Callable[..., Any]:
    """Return the forward of a module that gives the module to `after` at the end of each call.

    A forward hook would do, but torch.fx loses hooks when it copies a graph module.
    """

    @wraps(forward)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        after(self)
        return outputs

    return run
