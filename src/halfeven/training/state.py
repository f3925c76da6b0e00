"""The state of a training run in one file, written atomically; the run goes on from it as if never interrupted."""

import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfeven.errors import CheckpointError
from halfeven.files import write_atomically

STATE_FILE = "state.pt"
FORMAT = 2


@dataclass(kw_only=True)
class TrainingState:
    """All that a run needs to go on. It holds no random generator: every draw is a function of seed and position."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    step: int
    """Optimizer steps taken."""
    best: dict[str, float]
    """Metrics of the best validation so far; {} before the first."""
    last: dict[str, float]
    """Metrics of the last validation; {} before the first."""
    position: dict[str, int]
    """What the order of the images depends on: seed, number of images, batch size, accumulation, processes."""
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    """States of what accompanies the training, by name: averages, oscillations."""
    header: str = ""
    """JSON of what the caller needs to make the model anew: the plan, for a quantized one."""
    format: int = FORMAT


def save_state(state: TrainingState, path: Path) -> None:
    """Write the state of a run."""
    content = {key: getattr(state, key) for key in TrainingState.__dataclass_fields__}
    write_atomically(path, lambda partial: torch.save(content, partial))


def load_state(path: Path) -> TrainingState:
    """Read the state of a run; nothing in it is executed.

    Raises:
        CheckpointError: no such file, or not one that this version writes.
    """
    if not path.is_file():
        raise CheckpointError(
            f"There is no training state {path}, so there is no run to resume. Leave --resume out, or give the "
            "--work-dir "
            "of the interrupted run."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a training state: {str(error).splitlines()[0]} A run cannot go on from it. "
            "Start anew in another --work-dir."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} holds a training state of format {found}; this version of halfeven writes and reads format "
            f"{FORMAT}. "
            "Its parts would be misread. Resume with the version that wrote it, or start anew in another --work-dir."
        )
    return TrainingState(**content)


def check_position(found: dict[str, int], wanted: dict[str, int], path: Path) -> None:
    """Refuse to resume where the order of the images would not be the same.

    Raises:
        CheckpointError: a seed, batch size or number of processes that differs.
    """
    changed = [f"{key} {found.get(key)} then, {wanted[key]} now" for key in wanted if found.get(key) != wanted[key]]
    if changed:
        raise CheckpointError(
            f"The run in {path} cannot be resumed with other settings ({'; '.join(changed)}): it would see images "
            "twice or not at "
            "all. Resume with the settings it was started with, or start a new run in another --work-dir."
        )
