"""Take a model out of what it is wrapped in (torch.compile, DistributedDataParallel, DataParallel, AveragedModel), and
its forward out of the mixed precision that Accelerate puts around it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim.swa_utils import AveragedModel

from halfeven.graph.torch_private import compiled_module


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers, however many there are; a model without a wrapper is returned as it is."""
    while (inner := wrapped_module(model)) is not None:
        model = inner
    return model


def wrapped_module(model: nn.Module) -> nn.Module | None:
    """Return the module directly inside of a wrapper; None for a module that is no wrapper."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel | AveragedModel):
        inner: nn.Module = model.module
        return inner
    return compiled_module(model)


ORIGINAL_FORWARD = "_original_forward"
"""Attribute in which Accelerate keeps a model's own forward, where it calls it in mixed precision."""


def has_mixed_forward(model: nn.Module) -> bool:
    """Return True if Accelerate has put mixed precision around a model's forward; it stays there after the training."""
    wrapped = getattr(vars(model).get("forward"), "__wrapped__", None)
    return ORIGINAL_FORWARD in vars(model) and type(wrapped).__module__.startswith("accelerate.")


def take_off_mixed_forward(model: nn.Module) -> None:
    """Give a model its own forward back, in place."""
    if has_mixed_forward(model):
        del vars(model)[ORIGINAL_FORWARD], vars(model)["forward"]


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Use a model's own forward within the context."""
    kept = {name: vars(model)[name] for name in (ORIGINAL_FORWARD, "forward")} if has_mixed_forward(model) else {}
    take_off_mixed_forward(model)
    try:
        yield
    finally:
        vars(model).update(kept)
