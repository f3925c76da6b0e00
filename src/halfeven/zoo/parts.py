"""The parts of labelled data: for training, calibration and validation, and held out to choose the best model."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Subset, default_collate

from halfeven.errors import ConfigError
from halfeven.zoo.options import DataOptions

ExampleBatch = Tensor | dict[str, Tensor] | tuple[Tensor, ...]


class Samples(Protocol):
    """A dataset of known length whose items are (input, target): (image, label) for example."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """The parts of the data, and the number of classes of their labels."""

    train: Samples
    calibration: Samples
    validation: Samples
    num_classes: int
    train_as_evaluated: Samples | None = None
    """The training samples in the same order, preprocessed as in evaluation; None: `train` is all there is."""
    holdout: Samples | None = None
    """Samples that choose the best checkpoint with `data.selection="holdout"`; None: a part of `train` is held out."""

    @property
    def selection(self) -> Samples:
        """Return the samples that choose the best checkpoint."""
        return self.validation if self.holdout is None else self.holdout

    def parts(self) -> dict[str, Samples]:
        """Return the parts that a run reads, by name."""
        parts = {"train": self.train, "calibration": self.calibration, "validation": self.validation}
        return parts if self.holdout is None else {**parts, "holdout": self.holdout}

    def example(self) -> ExampleBatch:
        """Return two validation inputs as a batch, to capture a model with."""
        inputs = [self.validation[index][0] for index in range(min(2, len(self.validation)))]
        try:
            found: ExampleBatch = default_collate(inputs)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"The first two validation inputs make no batch ({next(iter(str(error).splitlines()), '')}), so the "
                "model cannot be captured. Give tensors of one size, or dicts or tuples of them."
            ) from error
        return found


def calibration_subset(samples: Samples, options: DataOptions) -> Samples:
    """Draw the calibration samples: the same ones for the same seed."""
    count = min(options.calibration_samples, len(samples))
    order = np.random.default_rng(options.calibration_seed).permutation(len(samples))[:count]
    return subset(samples, sorted(order.tolist()))


def subset(samples: Samples, indices: list[int]) -> Samples:
    """Return some of the samples, in the order of the indices."""
    found: Any = Subset(samples, indices)  # type: ignore[arg-type]
    chosen: Samples = found
    return chosen
