"""BatchNorm's running statistics in a distributed run: each process has those of its own share of the data."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

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


def own_statistics(models: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Return copies of this process's BatchNorm statistics of several models, by the model's number and the name."""
    return {name: tensor.detach().cpu().clone() for name, tensor in _running_statistics(models).items()}


@torch.no_grad()
def set_own_statistics(models: Iterable[nn.Module], own: Mapping[str, Tensor]) -> None:
    """Set BatchNorm statistics to those that `own_statistics` has returned; {} changes nothing."""
    found = _running_statistics(models)
    for name, tensor in own.items():
        found[name].copy_(tensor)


def _running_statistics(models: Iterable[nn.Module]) -> dict[str, Tensor]:
    return {
        f"{number}.{name}.{kind}": tensor
        for number, model in enumerate(models)
        for name, module in batchnorms(model).items()
        for kind, tensor in (("running_mean", module.running_mean), ("running_var", module.running_var))
        if tensor is not None
    }
