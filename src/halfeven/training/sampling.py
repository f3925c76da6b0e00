"""Which images come when, and with which random numbers: pure functions of the seed, the same in a resumed run.

Nothing here depends on what was drawn before: the order is a function of (seed, epoch), an image's augmentation of
(seed, epoch, index), and the model's own random numbers (dropout) of (seed, step, process). So workers, interruptions
and resumptions do not matter.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from halfeven.distributed import rank, world_size
from halfeven.errors import ConfigError
from halfeven.training.options import TrainingOptions


def mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Run a block with the generators of torch (CPU), Python and NumPy seeded, and give them back as they were."""
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()
    seed = mix(*numbers)
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])


class SeededImages(Dataset[Any]):
    """Images whose random augmentation depends only on (seed, epoch, index); items are asked for by (epoch, index)."""

    def __init__(self, images: Any, seed: int) -> None:
        self.images, self.seed = images, seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """The image `index` as it looks in `epoch`."""
        epoch, index = key
        with seeded(self.seed, epoch, index):
            return self.images[index]


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """This process's batches of an epoch, from any position on.

    All processes draw the same order; it is lengthened from its own start to a whole number of images each, and dealt
    out in turn.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, drop_last: bool) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.share = -(-length // world_size())
        self.batches = self.share // batch_size if drop_last else -(-self.share // batch_size)
        self.epoch, self.start = 0, 0
        self._check(drop_last)

    def _check(self, drop_last: bool) -> None:
        if self.batches == 0:
            raise ConfigError(
                f"{self.length} training images on {world_size()} process(es) do not fill one batch of "
                f"{self.batch_size}: "
                "no step would be taken. Set training.batch_size lower, or training.drop_last=False."
            )
        if not drop_last and self.share % self.batch_size == 1 and self.batch_size > 1:
            raise ConfigError(
                f"An epoch's last batch would hold one image ({self.share} images in batches of {self.batch_size}), "
                "of which BatchNorm cannot take a variance. Set training.drop_last=True or another training.batch_size."
            )

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.length)
        mine = np.resize(order, self.share * world_size())[rank() :: world_size()]
        for batch in range(self.start, self.batches):
            part = mine[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in part]

    def __len__(self) -> int:
        return self.batches - self.start


class TrainingBatches:
    """The loader of the training images, which can start at any batch of any epoch."""

    def __init__(
        self,
        images: Any,
        options: TrainingOptions,
        *,
        seed: int,
        workers: int,
        collate: Callable[[Any], Any] = default_collate,
    ) -> None:
        self.sampler = EpochBatches(len(images), options.batch_size, seed=seed, drop_last=options.drop_last)
        self.loader: DataLoader[Any] = DataLoader(
            SeededImages(images, seed),
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return self.sampler.batches

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        """The batches of one epoch from batch `start` on."""
        self.sampler.epoch, self.sampler.start = number, start
        return iter(self.loader)
