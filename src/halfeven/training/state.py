"""The state of a training run, in one file: a run resumed from it equals an uninterrupted run."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfeven.errors import CheckpointError
from halfeven.files import write_atomically

STATE_FILE = "state.pt"
FORMAT = 2
"""Version of the file's layout; a file of another version is refused."""

LABELS = {"images": "samples"}
"""Names of positions in messages, where they differ from those in files."""


@dataclass(kw_only=True)
class TrainingState:
    """The state of a run. It has no random generator: each draw is a function of seed and position."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    step: int
    """Number of optimizer steps taken."""
    best: dict[str, float]
    """Metrics of the best validation so far; {} before the first."""
    last: dict[str, float]
    """Metrics of the last validation; {} before the first."""
    position: dict[str, int]
    """Settings that the order of the samples depends on: seed, number of samples (under the name "images"), batch size,
    accumulation, processes."""
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    """States of the callback's objects by name, for example of the average of the weights."""
    header: str = ""
    """JSON of the facts that the caller needs to make the model anew; for a quantized model its plan."""
    format: int = FORMAT


def save_state(state: TrainingState, path: Path) -> None:
    """Write the state of a run atomically."""
    content = {key: getattr(state, key) for key in TrainingState.__dataclass_fields__}
    write_atomically(path, lambda partial: torch.save(content, partial))


def load_state(path: Path) -> TrainingState:
    """Return the state of a run, read without executing any code of the file.

    Raises:
        CheckpointError: there is no such file, it is damaged, or another version of halfeven wrote it.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no training state {path}, so there is no run to resume. Leave --resume out, or give the "
            "--work-dir of the interrupted run."
        )
    try:
        # "cpu": the file may come from a machine with another device; `load_state_dict` moves what it loads.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a training state: {str(error).splitlines()[0]} The run cannot be resumed from "
            "it. Start anew in another --work-dir."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} holds a training state of format {found}; this version of halfeven reads format {FORMAT} and "
            "would misread it. Resume with the version that wrote it, or start anew in another --work-dir."
        )
    return TrainingState(**content)


def check_position(found: dict[str, int], wanted: dict[str, int], path: Path) -> None:
    """Check that a resumed run would see the samples in the same order.

    Raises:
        CheckpointError: seed, number of samples, batch size, accumulation or number of processes has changed.
    """
    changed = [
        f"{LABELS.get(key, key)} {found.get(key)} then, {wanted[key]} now"
        for key in wanted
        if found.get(key) != wanted[key]
    ]
    if changed:
        raise CheckpointError(
            f"The run in {path} cannot be resumed with other settings ({'; '.join(changed)}): it would see samples "
            "twice or never. Resume with the settings that it was started with, "
            "or start a new run in another --work-dir."
        )
