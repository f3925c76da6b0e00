"""Run a model with BatchNorm as training computes it, and change nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from halfeven.layerwise.batchnorm_statistics import batchnorms


def trained_batchnorms(model: nn.Module) -> list[Any]:
    """Return the BatchNorm modules that training normalizes by the batch, and whose statistics have left their start.

    Frozen ones are left out (`unfrozen_batchnorms`), and a model without trained parameters has none. Statistics at
    their start are not unsettled: the model is untrained.
    """
    if not _has_trained_parameters(model):
        return []
    return [norm for norm in unfrozen_batchnorms(model) if not at_start(norm)]


def unfrozen_batchnorms(model: nn.Module) -> list[Any]:
    """Return the BatchNorm modules that training normalizes by the batch.

    Frozen ones are left out: those in eval mode in a model that is in training mode, and those whose scale and shift
    are not trained while other parameters are.
    """
    trained = _has_trained_parameters(model)
    return [norm for norm in batchnorms(model).values() if not _is_frozen(norm, model.training, trained)]


def _has_trained_parameters(model: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in model.parameters())


def at_start(norm: Any) -> bool:
    """Return True where running statistics are those of a new module: means of 0, variances of 1.

    The counter of batches does not tell: weights converted from other frameworks have statistics, and a counter of 0.
    """
    return not bool(norm.running_mean.any()) and bool((norm.running_var == 1).all())


def _is_frozen(norm: Any, training: bool, trained: bool) -> bool:
    mean = norm.running_mean
    kept = (training and not norm.training) or (trained and norm.weight is not None and not norm.weight.requires_grad)
    # In a distributed run SyncBatchNorm refuses to train on a CPU.
    on_gpus_alone = isinstance(norm, nn.SyncBatchNorm) and mean.device.type == "cpu"
    return kept or on_gpus_alone or norm.num_batches_tracked is None


@contextmanager
def normalizing_by_batch(norms: list[Any]) -> Iterator[None]:
    """Make BatchNorm modules normalize by the batch within the context; their running statistics stay."""
    kept = [(norm, norm.training, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 0.0  # the running statistics do not move
            # The forward pass counts in place, so the counter is a copy.
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
        yield
    finally:
        for norm, training, momentum, tracked in kept:
            norm.train(training)
            norm.momentum = momentum
            norm.num_batches_tracked = tracked
