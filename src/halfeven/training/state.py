"""The state of a training run, in one file: a run resumed from it equals an uninterrupted run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from halfeven.errors import CheckpointError, HalfevenError
from halfeven.files import write_atomically
from halfeven.integrity import check_zip

STATE_FILE = "state.pt"
FORMAT = 2
"""Version of the file's layout; a file of another version is refused."""

NO_RESUME = (
    "The run cannot be resumed from it. best.safetensors beside it can still be tested and exported; start anew with "
    "--overwrite or in another --work-dir."
)

POSITION_NAMES = {"images": "samples"}
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
    trained: bool | None = None
    """True where the best is a trained model, and not the one that training started from; None: an earlier version of
    halfeven wrote the file, and did not say."""
    format: int = FORMAT


FIELD_TYPES: dict[str, type] = {
    **dict.fromkeys(("model", "optimizer", "scaler", "best", "last", "position", "others"), dict),
    "step": int,
    "header": str,
}
"""Types of the fields in a file."""


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
        check_zip(path)
        # "cpu": the file may come from a machine with another device; `load_state_dict` moves what it loads.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {NO_RESUME}") from error
    except MemoryError:
        raise
    except Exception as error:  # a file of another program meets whatever its reader stumbles over
        raise CheckpointError(
            f"{path} cannot be read as a training state ({type(error).__name__}). {NO_RESUME}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(
            f"{path} holds a training state of format {found}; this version of halfeven reads format {FORMAT} and "
            "would misread it. Resume with the version that wrote it, or start anew in another --work-dir."
        )
    wrong = [name for name, kind in FIELD_TYPES.items() if not isinstance(content.get(name), kind)]
    if wrong := wrong + [str(key) for key in content if key not in TrainingState.__dataclass_fields__]:
        raise CheckpointError(f"{path} holds no whole training state (look at {', '.join(wrong[:5])}). {NO_RESUME}")
    return TrainingState(**content)


@contextmanager
def explaining_misfit(path: Path) -> Iterator[None]:
    """Explain torch's errors, within the context, about a state that does not fit model and optimizer."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if isinstance(error, HalfevenError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"The state in {path} does not belong to this model and its optimizer ({type(error).__name__}: {reason}). "
            f"{NO_RESUME}"
        ) from error


def check_position(found: dict[str, int], wanted: dict[str, int], path: Path) -> None:
    """Check that a resumed run would see the samples in the same order.

    Raises:
        CheckpointError: seed, number of samples, batch size, accumulation or number of processes has changed.
    """
    changed = [
        f"{POSITION_NAMES.get(key, key)} {found.get(key)} then, {wanted[key]} now"
        for key in wanted
        if found.get(key) != wanted[key]
    ]
    if changed:
        raise CheckpointError(
            f"The run in {path} cannot be resumed with other settings ({'; '.join(changed)}): it would see samples "
            "twice or never. Resume with the settings that it was started with, "
            "or start a new run in another --work-dir."
        )
