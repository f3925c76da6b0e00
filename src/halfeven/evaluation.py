"""Measure the accuracy of a model (float, simulated or deployed) on labelled data, in one process or many."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, default_collate

from halfeven.checked_arguments import checked_arguments
from halfeven.distributed import rank, world_size
from halfeven.errors import ConfigError, HalfevenError, InputError, last_line
from halfeven.graph.batches import run_on
from halfeven.imports import extra
from halfeven.quantization.model_quantizers import weights_quantized_once
from halfeven.tasks import Task
from halfeven.tasks.task import Metrics

Model = Callable[..., Any]
"""A module, or any function from a batch of inputs to outputs."""
Evaluate = Callable[[nn.Module], Any]
"""A user's metric of a model, more being better: returns a number, or a number for each sample."""


@checked_arguments(InputError)
def evaluate(
    model: Model,
    loader: Iterable[tuple[Any, Any]],
    task: Task,
    *,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> Metrics:
    """Return the task's metrics in percent: for classification `top1`, and `top5` where there are more than 5 classes.

    In a distributed run every process must call this function with its own share of the data (`evaluation_loader`);
    each gets the metrics over all data. A module computes in eval mode, and its modes are restored.

    Args:
        model: a module, or any function from a batch of inputs to outputs.
        loader: batches of inputs and targets; inputs are a tensor, a tuple or list of positional arguments, or a dict
            of keyword arguments.
        task: computes the metrics.
        device: where the model is.
        on_batch: called with the number of samples after each batch.

    Raises:
        ConfigError: the packages of the extra `train` are not installed.
    """
    with extra("train", "Evaluation"):
        from accelerate.utils import find_batch_size, send_to_device

    # torchmetrics adds up the processes' counts in `compute`, so each one judges its own samples alone.
    metrics = task.metrics().to(device)
    with torch.no_grad(), evaluating(model):
        for batch in loader:
            inputs, targets = send_to_device(batch, device, non_blocking=True)
            metrics.update(*task.judged(run_on(model, inputs), targets))
            if on_batch is not None:
                on_batch(find_batch_size(inputs))
    computed = metrics.compute()
    # A single metric gives a tensor, a collection a dict.
    found = task.figures({task.key: computed} if isinstance(computed, Tensor) else computed)
    return {name: float(value) for name, value in found.items()}  # a task of the user's may return tensors


def metric_values(evaluate: Evaluate, model: nn.Module) -> Tensor:
    """Return a user's metric of a model in eval mode: [samples], or [1] where it is one number.

    Raises:
        ConfigError: the function fails, or the metric is no finite number, or several.
    """
    with torch.no_grad(), evaluating(model), weights_quantized_once(model):
        try:
            found = evaluate(model)
        except (HalfevenError, Warning):
            raise
        except Exception as error:
            raise ConfigError(
                f"evaluate, the function that was given, ended with {type(error).__name__}: {last_line(error)}. It is "
                f"called with a model in eval mode, here a {type(model).__name__}, and must return its metric."
            ) from error
    try:
        values = torch.as_tensor(found, dtype=torch.float64).flatten().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise _unusable_error(found) from error
    if not values.numel() or not bool(values.isfinite().all()):
        raise _unusable_error(found)
    return values


def _unusable_error(found: object) -> ConfigError:
    return ConfigError(
        f"evaluate returned {str(found)[:60]}, which is no metric, so models could not be compared. Return a finite "
        "number, more being better, or a sequence with a number for each sample."
    )


@contextmanager
def evaluating(model: Callable[..., Any]) -> Iterator[None]:
    """Put a module in eval mode within the context. Each submodule gets its own mode back: some may be frozen."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def evaluation_loader(
    items: Any,
    batch_size: int,
    workers: int = 0,
    *,
    shared: bool = True,
    collate: Callable[[Any], Any] = default_collate,
) -> DataLoader[Any]:
    """Return a loader of batches in order.

    Args:
        items: a data set.
        batch_size: samples of a batch.
        workers: number of processes that read samples.
        shared: in a distributed run, True: the processes share the data, each sample once; False: each has all of it.
        collate: makes a batch of a list of samples.
    """
    if shared and world_size() > 1:
        # Each sample once; torch's DistributedSampler repeats some, to give all processes as many.
        items = Subset(items, range(rank(), len(items), world_size()))
    # Copies to a GPU run beside its work only from pinned memory.
    pinned = torch.cuda.is_available()
    return DataLoader(items, batch_size=batch_size, num_workers=workers, collate_fn=collate, pin_memory=pinned)
