"""Hold out a part of the training samples to choose the best checkpoint by.

The best of many checkpoints on the validation samples looks better there than it is: it was chosen for them. Chosen on
samples that are neither trained on nor reported, its validation accuracy is that of new samples.
"""

import dataclasses

import numpy as np

from halfeven.errors import ConfigError
from halfeven.zoo.options import DataOptions
from halfeven.zoo.origins import origins
from halfeven.zoo.parts import Datasets, Samples, calibration_subset, subset


def hold_out(datasets: Datasets, options: DataOptions) -> Datasets:
    """Return data whose training and calibration samples lack a seeded part, which becomes `holdout`.

    Args:
        datasets: the data as its source gives it.
        options: the share and the seed of the part.

    Raises:
        ConfigError: the part, or what is left for training or calibration, would be empty.
    """
    if datasets.holdout is not None:
        return datasets  # the user's function has its own
    train = datasets.train
    evaluated = train if datasets.train_as_evaluated is None else datasets.train_as_evaluated
    if len(evaluated) != len(train):
        raise ConfigError(
            f"Datasets.train has {len(train)} samples and train_as_evaluated has {len(evaluated)}, so a sample held "
            "out of one cannot be found in the other. Give the same samples in the same order."
        )
    count = max(1, round(options.holdout_share * len(train)))
    if count >= len(train):
        raise ConfigError(
            f"data.holdout_share={options.holdout_share} of {len(train)} training samples leaves none to train on. "
            'Lower it, or set data.selection="validation".'
        )
    order = np.random.default_rng((options.holdout_seed, len(train))).permutation(len(train))
    # Drawn at random, and kept in the order of the data.
    held = sorted(order[:count].tolist())
    rest = sorted(order[count:].tolist())
    holdout = subset(evaluated, held)
    return dataclasses.replace(
        datasets,
        train=subset(train, rest),
        train_as_evaluated=None if datasets.train_as_evaluated is None else subset(evaluated, rest),
        calibration=_calibration_without(datasets, options, rest, (holdout, subset(train, held))),
        holdout=holdout,
    )


def _calibration_without(
    datasets: Datasets, options: DataOptions, rest: list[int], held_out: tuple[Samples, ...]
) -> Samples:
    """Return calibration samples of which none is held out: ranges are fitted to them."""
    if options.source != "callable":
        assert datasets.train_as_evaluated is not None
        return calibration_subset(subset(datasets.train_as_evaluated, rest), options)
    held = {origin for samples in held_out for origin in origins(samples)}
    kept = [index for index, origin in enumerate(origins(datasets.calibration)) if origin not in held]
    if not kept:
        raise ConfigError(
            "All calibration samples of data.function are among those that are held out, so no range can be set. Lower "
            "data.holdout_share, or let data.function return more calibration samples."
        )
    return subset(datasets.calibration, kept)
