"""Run a model (float, simulated or deployed) over labelled images, in one process or many: its accuracy."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from halfeven.distributed import rank, world_size

Model = Callable[[Tensor], Any]


def evaluate(
    model: Model,
    loader: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    *,
    device: torch.device | str = "cpu",
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Accuracy in percent: `top1`, and `top5` where there are more than 5 classes.

    In a distributed run every process must call this, each with its own share of the images (`evaluation_loader`); all
    get the accuracy over all images. A module is put in `eval()` and given back as it was.

    Args:
        model: a module, or any function from a batch of images to logits.
        on_batch: called with the number of images after each batch.
    """
    ranks = {"top1": 1, "top5": 5} if num_classes > 5 else {"top1": 1}
    metrics = MetricCollection(
        {name: MulticlassAccuracy(num_classes, top_k=k, average="micro") for name, k in ranks.items()},
        compute_groups=False,
    ).to(device)
    with torch.no_grad(), evaluating(model):
        for images, labels in loader:
            logits = model(images.to(device, non_blocking=True))
            metrics.update(logits.float(), labels.to(device, non_blocking=True))
            if on_batch is not None:
                on_batch(len(labels))
    return {name: round(100 * float(value), 4) for name, value in metrics.compute().items()}


@contextmanager
def evaluating(model: Callable[..., Any]) -> Iterator[None]:
    """Put a module in eval() and give each submodule its own mode back: some may be frozen in a training one."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if isinstance(model, nn.Module):
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def evaluation_loader(images: Any, batch_size: int, workers: int = 0, *, shared: bool = True) -> DataLoader[Any]:
    """Batches in order; in a distributed run each process gets its share, every image once, or all if not `shared`."""
    if shared and world_size() > 1:
        images = Subset(images, range(rank(), len(images), world_size()))
    return DataLoader(images, batch_size=batch_size, num_workers=workers, pin_memory=torch.cuda.is_available())
