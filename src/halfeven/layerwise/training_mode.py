"""Run a model with BatchNorm as training computes it, and change nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from halfeven.layerwise.batchnorm_statistics import batchnorms


def trained_batchnorms(model: nn.Module) -> list[Any]:
    """Return the BatchNorm modules that training normalizes by the batch, and that have seen a batch before.

    Frozen ones are left out: those in eval mode in a model that is in training mode, and those whose scale and shift
    are not trained. Statistics that no batch has moved are not unsettled: the model is untrained.
    """
    return [module for module in batchnorms(model).values() if _is_trained(module, model)]


def _is_trained(norm: Any, model: nn.Module) -> bool:
    frozen = (model.training and not norm.training) or (norm.weight is not None and not norm.weight.requires_grad)
    on_cpu = norm.running_mean.device.type == "cpu"
    # In a distributed run SyncBatchNorm refuses to train on a CPU.
    on_gpus_alone = isinstance(norm, nn.SyncBatchNorm) and on_cpu
    tracked = norm.num_batches_tracked
    return not frozen and not on_gpus_alone and tracked is not None and int(tracked) > 0


@contextmanager
def normalizing_by_batch(norms: list[Any]) -> Iterator[None]:
    """Make BatchNorm modules normalize by the batch within the context; their running statistics stay."""
    kept = [(norm, norm.training, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.train()
            norm.momentum = 0.0  # the running statistics do not move
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
        yield
    finally:
        for norm, training, momentum, tracked in kept:
            norm.train(training)
            norm.momentum = momentum
            norm.num_batches_tracked = tracked
