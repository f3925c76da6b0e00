"""Take a model out of what it is wrapped in: torch.compile, DistributedDataParallel, DataParallel."""

from torch import nn

from halfeven.graph.torch_private import compiled_module


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers, however many there are; a model without a wrapper is returned as it is."""
    while (inner := wrapped_module(model)) is not None:
        model = inner
    return model


def wrapped_module(model: nn.Module) -> nn.Module | None:
    """Return the module directly inside of a wrapper; None for a module that is no wrapper."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        inner: nn.Module = model.module
        return inner
    return compiled_module(model)
