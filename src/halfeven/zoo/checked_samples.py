"""Check each sample where it is read: an error names part, index, file and label, or the next good sample is taken."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from halfeven.errors import ConfigError, HalfevenError
from halfeven.zoo.origins import Wrapped, parent
from halfeven.zoo.parts import Datasets, Samples

SKIPPED_FILE = "skipped.jsonl"
"""File in the work folder with a line for each sample that was left out."""
MOST_IN_A_ROW = 100
"""Largest number of bad samples, one after the other, that are left out."""
PARTS = ("train", "calibration", "validation", "holdout")


class SampleError(ConfigError):
    """A sample that cannot be read, or that the task cannot use."""

    def __init__(self, message: str) -> None:
        # torch's loader passes on an error of its worker processes as the text of a traceback, which ends with it.
        super().__init__(message.rpartition(f"{SampleError.__name__}: ")[2].strip())


class CheckedSamples(Wrapped):
    """Samples that are checked where they are read.

    Args:
        samples: a part of the data.
        part: its name, for messages.
        on_bad: "error" raises a `SampleError`; "skip" takes the next good sample in the place of a bad one, which
            depends on nothing but the data, so that a resumed run takes the same.
        folder: where "skip" writes down which samples were left out, once the folder exists.
    """

    def __init__(self, samples: Samples, part: str, on_bad: Literal["error", "skip"], folder: Path) -> None:
        self.samples = samples
        self.part = part
        self.on_bad = on_bad
        self.folder = folder
        self.wrong_target: Callable[[Any], str] = _nothing_wrong
        self.like: Tensor | None = None
        """An input whose shape and dtype all must have; None: they may differ."""

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        """Return a sample.

        Raises:
            SampleError: the sample is bad and none may be left out, or too many in a row are bad.
        """
        if not -len(self) <= index < len(self):
            # A loop over the samples ends with this error.
            raise IndexError(f"There are {len(self)} samples, numbered from 0, and none has the number {index}.")
        error: Exception | None = None
        for place in range(index, index + (MOST_IN_A_ROW if self.on_bad == "skip" else 1)):
            number = place % len(self)
            try:
                item = self.samples[number]
                reason = self._what_is_wrong(item)
            except HalfevenError:
                raise
            except Exception as raised:  # data sets are the user's code, and raise what they like
                error = raised
                first_line = next(iter(str(raised).strip().splitlines()), "no reason given")
                reason = f"{type(raised).__name__}: {first_line}"
            if not reason:
                return item
            self._note_skipped(number, reason)
        raise SampleError(self._error_text(index, reason)) from error

    def _what_is_wrong(self, item: Any) -> str:
        if not isinstance(item, tuple | list) or len(item) != 2:
            return f"it is a {type(item).__name__}, and must be a pair of input and target"
        image, target = item
        like = self.like
        if like is not None and isinstance(image, Tensor) and (image.shape, image.dtype) != (like.shape, like.dtype):
            return (
                f"it is {image.dtype} of shape {list(image.shape)}, and the first sample is {like.dtype} of shape "
                f"{list(like.shape)}"
            )
        return self.wrong_target(target)

    def describe(self, index: int) -> str:
        """Return the index of a sample with its file and label, where they are known."""
        file, label = file_and_label(self.samples, index)
        known = [f"file {file}"] if file else []
        known += [f"label {label}"] if label is not None else []
        return f"{index} ({', '.join(known)})" if known else str(index)

    def _error_text(self, index: int, reason: str) -> str:
        what = f"The {self.part} sample {self.describe(index)} cannot be used: {reason}."
        if self.on_bad == "skip":
            return f"{what} The {MOST_IN_A_ROW - 1} samples after it cannot be used either. Look at the data."
        return (
            f'{what} Mend or remove it, or set data.on_bad_sample="skip" to take the next one in its place; a resumed '
            "run may change that."
        )

    def _note_skipped(self, index: int, reason: str) -> None:
        if self.on_bad == "skip" and self.folder.is_dir():
            line = json.dumps({"part": self.part, "sample": self.describe(index), "reason": reason})
            with (self.folder / SKIPPED_FILE).open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def check_targets(self) -> None:
        """Check all targets that are at hand without reading the samples.

        Raises:
            SampleError: a target cannot be used.
        """
        for index, target in enumerate(targets_at_hand(self.samples) if self.on_bad == "error" else ()):
            if reason := self.wrong_target(target):
                raise SampleError(self._error_text(index, reason))


def _nothing_wrong(target: Any) -> str:
    """Accept any target; a function with a name, since processes that read samples get it pickled."""
    return ""


def with_checks(datasets: Datasets, on_bad: Literal["error", "skip"], folder: Path) -> Datasets:
    """Return data whose samples are checked where they are read."""
    parts: dict[str, Any] = {
        name: CheckedSamples(samples, name, on_bad, folder) for name, samples in datasets.parts().items()
    }
    return dataclasses.replace(datasets, **parts)


def check_targets(datasets: Datasets, wrong_target: Callable[[Any], str], *, one_size: bool) -> None:
    """Check all targets at hand, and from now on each sample that is read.

    Args:
        datasets: from `with_checks`.
        wrong_target: says what is wrong with a target; "" where nothing is.
        one_size: inputs of a part must have one shape and dtype, as its batches are stacked.

    Raises:
        SampleError: a target, or the first sample of a part, cannot be used.
    """
    for part in datasets.parts().values():
        assert isinstance(part, CheckedSamples)
        part.wrong_target = wrong_target
        part.check_targets()
        first = part[0][0]
        part.like = first if one_size and isinstance(first, Tensor) else None


def file_and_label(samples: Any, index: int) -> tuple[str, Any]:
    """Return file and label of a sample, "" and None where they are not known without reading it."""
    samples, index = parent(samples, index)
    files = getattr(samples, "samples", None)  # torchvision's folders: pairs of path and label
    file = ""
    if isinstance(files, list) and len(files) == len(samples) and isinstance(files[index], tuple):
        file = str(files[index][0])
    targets = targets_at_hand(samples)
    return file, targets[index] if targets else None


def targets_at_hand(samples: Any) -> Sequence[Any]:
    """Return the targets of a data set that are numbers and in memory; () where there are none."""
    if isinstance(samples, Subset):
        known = targets_at_hand(samples.dataset)
        return [known[index] for index in samples.indices] if known else ()
    if isinstance(samples, TensorDataset) and len(samples.tensors) == 2 and samples.tensors[1].ndim == 1:
        return list(samples.tensors[1].tolist())
    targets: Any = getattr(samples, "targets", None)
    of_torchvision = type(samples).__module__.startswith("torchvision.")  # others may mean something else by the name
    if of_torchvision and isinstance(targets, list) and getattr(samples, "target_transform", None) is None:
        return targets
    return ()


def count_skipped(folder: Path) -> str:
    """Return how many samples of each part the runs in a folder have left out, as text; "" for none."""
    file = folder / SKIPPED_FILE
    lines = set(file.read_text(encoding="utf-8").splitlines()) if file.is_file() else ()
    parts = Counter(json.loads(line)["part"] for line in lines)
    return ", ".join(f"{parts[part]} {part}" for part in PARTS if parts[part])
