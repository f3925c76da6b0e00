"""The order of samples and all random numbers of a training: pure functions of seed and position.

Nothing depends on earlier draws: the order is a function of (seed, epoch), a sample's augmentation of (seed, epoch,
index), what is drawn to make a batch of (seed, epoch, index of its first sample), and the model's own random numbers
(dropout) of (seed, step, process). So a run is the same with any number of workers, and after an interruption.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from halfeven.distributed import rank, world_size
from halfeven.errors import ConfigError
from halfeven.training.options import TrainingOptions
from halfeven.training.stopping import init_worker


def mix(*numbers: int) -> int:
    """Return a well-mixed 63-bit seed made of several small numbers."""
    # A sum or a hash of small numbers would give neighbouring steps related seeds. 63 bits fit a signed integer.
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the generators of torch (CPU), Python and NumPy within the context, and restore their states after it."""
    torch_state = torch.get_rng_state()
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    seed = mix(*numbers)
    # `torch.manual_seed` would seed every GPU as well, for each sample.
    torch.default_generator.manual_seed(seed)
    _seed_others(seed)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def seed_generators(seed: int) -> None:
    """Seed the generators of torch (CPU and GPUs), Python and NumPy, from which models and data sets draw."""
    torch.manual_seed(seed)
    _seed_others(seed)


def _seed_others(seed: int) -> None:
    random.seed(seed)
    # NumPy's old generator takes 32 bits.
    np.random.seed(seed % 2**32)


class SeededSamples(Dataset[Any]):
    """Samples, indexed by (epoch, index), whose random augmentation depends on (seed, epoch, index) alone."""

    def __init__(self, samples: Any, seed: int) -> None:
        self.samples = samples
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """Return the sample `index` as it is augmented in `epoch`."""
        epoch, index = key
        # In a worker process, too: its own generators have no part in the sample.
        with seeded(self.seed, epoch, index):
            return self.samples[index]

    def __getitems__(self, keys: list[tuple[int, int]]) -> "KeyedItems":
        """Return the samples of a batch, which a loader hands to its `collate_fn`."""
        return KeyedItems([self[key] for key in keys], keys[0])


class KeyedItems(list[Any]):
    """The samples of a batch, with the (epoch, index) of the first of them."""

    def __init__(self, items: list[Any], first: tuple[int, int]) -> None:
        super().__init__(items)
        self.first = first


@dataclass(frozen=True)
class SeededCollate:
    """Makes a batch of samples by a function whose random numbers depend on the seed and the batch's place alone."""

    collate: Callable[[Any], Any]
    seed: int

    def __call__(self, items: list[Any]) -> Any:
        assert isinstance(items, KeyedItems)
        # In a batch as in a sample: the generators of a process that reads ahead know nothing of the place. The 1 keeps
        # the numbers apart from those of the first sample.
        with seeded(self.seed, *items.first, 1):
            return self.collate(list(items))


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Yields this process's batches of `epoch`, from batch `start` on, as lists of (epoch, index).

    All processes draw the same order, which is lengthened from its own start so that each gets equally many samples,
    and deal it out in turn.

    Args:
        length: number of samples.
        batch_size: samples of a batch in each process.
        seed: decides on the order, with the epoch.
        drop_last: True to leave out the last, smaller batch of an epoch.

    Raises:
        ConfigError: an epoch has no batch, or a last batch of one sample.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, drop_last: bool) -> None:
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.share = -(-length // world_size())
        self.batches = self.share // batch_size if drop_last else -(-self.share // batch_size)
        self.epoch = 0
        self.start = 0
        self._check_batches(drop_last)

    def _check_batches(self, drop_last: bool) -> None:
        if self.batches == 0:
            raise ConfigError(
                f"{self.length} training samples on {world_size()} process(es) do not fill one batch of "
                f"{self.batch_size}, so no step would be taken. Lower training.batch_size, or set "
                "training.drop_last=False."
            )
        if not drop_last and self.share % self.batch_size == 1 and self.batch_size > 1:
            raise ConfigError(
                f"The last batch of an epoch would have one sample ({self.share} samples in batches of "
                f"{self.batch_size}), which has no variance for BatchNorm. Set training.drop_last=True or another "
                "training.batch_size."
            )

    def indices(self, epoch: int, batch: int) -> list[int]:
        """Return the indices of this process's samples in a batch of an epoch."""
        return [
            int(index) for index in self._own_indices(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]
        ]

    def _own_indices(self, epoch: int) -> np.ndarray[Any, Any]:
        """Return the indices of this process's samples of an epoch, in order."""
        # `np.resize` repeats the order from its start until every process has as many samples: with fewer, a process
        # would wait for the gradients of the others for ever.
        order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        return np.resize(order, self.share * world_size())[rank() :: world_size()]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        mine = self._own_indices(self.epoch)
        for batch in range(self.start, self.batches):
            part = mine[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in part]

    def __len__(self) -> int:
        return self.batches - self.start


class TrainingBatches:
    """The loader of the training samples, which can start at any batch of any epoch.

    Args:
        samples: training data, by index.
        options: batch size, and what becomes of an epoch's last batch.
        seed: decides on order and augmentation.
        workers: number of processes that read samples.
        prefetch: batches that each of them reads ahead.
        collate: makes a batch of a list of samples.
    """

    def __init__(
        self,
        samples: Any,
        options: TrainingOptions,
        *,
        seed: int,
        workers: int,
        prefetch: int = 2,
        collate: Callable[[Any], Any] = default_collate,
    ) -> None:
        self.sampler = EpochBatches(len(samples), options.batch_size, seed=seed, drop_last=options.drop_last)
        self.samples = SeededSamples(samples, seed)
        self.collate = SeededCollate(collate, seed)
        self.loader: DataLoader[Any] = DataLoader(
            self.samples,
            batch_sampler=self.sampler,
            collate_fn=self.collate,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            worker_init_fn=init_worker,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __len__(self) -> int:
        return self.sampler.batches

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        """Return the batches of an epoch, from batch `start` on."""
        # The sampler is in this process alone, and workers get (epoch, index) from it: those that outlive an epoch read
        # the next one's order.
        self.sampler.epoch = number
        self.sampler.start = start
        return iter(self.loader)

    def indices(self, epoch: int, batch: int) -> list[int]:
        """Return the indices of the samples in a batch, counted from the start of the epoch."""
        return self.sampler.indices(epoch, batch)

    def describe(self, index: int) -> str:
        """Return the index of a sample, with its file and label where the data know them."""
        described: Callable[[int], str] = getattr(self.samples.samples, "describe", str)
        return described(index)

    def items(self, epoch: int, batch: int) -> KeyedItems:
        """Return the samples of a batch, not collated, as they are augmented in that epoch."""
        return self.samples.__getitems__([(epoch, index) for index in self.indices(epoch, batch)])
