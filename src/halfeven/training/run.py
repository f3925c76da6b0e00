"""Where and how a training takes place, and its result."""

from dataclasses import dataclass, field
from pathlib import Path

from accelerate import Accelerator
from rich.console import Console

from halfeven.tasks.task import Metrics
from halfeven.training.progress import plain_console


@dataclass(frozen=True, kw_only=True)
class Run:
    """The place of a run: folder, device, processes and seed."""

    folder: Path
    """Folder for state, checkpoints and logs."""
    accelerator: Accelerator
    console: Console = field(default_factory=plain_console)
    seed: int = 0
    workers: int = 0
    """Number of processes that read samples."""
    prefetch: int = 2
    """Batches that each of them reads ahead."""
    channels_last: bool = False
    """Give the model images with the channels last in memory."""
    compiled: bool = False
    """Run training steps with the whole model compiled."""
    name: str = "quantized"
    """Name of the trained model's accuracy in the logs, for example "w8a8"."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Metrics of the best and of the last validation, and the number of optimizer steps taken."""

    best: Metrics
    last: Metrics
    steps: int
