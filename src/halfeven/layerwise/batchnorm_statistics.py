"""BatchNorm's running statistics in a distributed run: each process has those of its own share of the data."""

from torch import nn

from halfeven.distributed import average
from halfeven.graph.torch_private import AnyBatchNorm


def batchnorms(model: nn.Module) -> dict[str, AnyBatchNorm]:
    """Return the BatchNorm modules of a model that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, AnyBatchNorm) and module.running_mean is not None
    }


def average_batchnorm(model: nn.Module) -> None:
    """Give all processes the same BatchNorm statistics: the mean over the processes. Each process must call this."""
    statistics = [(module.running_mean, module.running_var) for module in batchnorms(model).values()]
    average(tensor for pair in statistics for tensor in pair if tensor is not None)
