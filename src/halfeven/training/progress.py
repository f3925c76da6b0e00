"""What a training run says while it runs: a progress bar, a JSON-lines file, and TensorBoard's curves."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from halfeven.imports import extra

QUIET_SECONDS = 30.0
"""Without a terminal, where no bar can be drawn, a line is printed this often."""


def described(metrics: dict[str, float]) -> str:
    """Metrics in a row, as "top1 89.99, top5 99.88"."""
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


class RunLog:
    """The bar and the log files of one run. All of it is silent where `main` is not set: one process speaks for all.

    Args:
        folder: where `log.jsonl` and `tensorboard/` are written.
        step: the step that the run starts at; what an interrupted run logged beyond it is taken back.
    """

    def __init__(self, folder: Path, title: str, *, total: int, step: int, console: Console, main: bool) -> None:
        self.console, self.main, self.total = console, main, total
        self._started, self._first, self._spoke = time.monotonic(), step, time.monotonic()
        self._images = 0
        if not main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "log.jsonl"
        self._forget(step)
        self._lines = self._path.open("a", encoding="utf-8")
        with extra("train", "Training"):
            from torch.utils.tensorboard import SummaryWriter

        self._curves = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self._task: TaskID = self._progress.add_task(title, total=total, completed=step, state="")
        self._progress.start()

    def _forget(self, step: int) -> None:
        """Drop the lines of steps after `step`, which a resumed run takes again; all of them when it starts anew."""
        if not self._path.is_file():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a line cut short by the interruption
                continue
            if step > 0 and record.get("step", 0) <= step:
                kept.append(line)
        self._path.write_text("".join(kept), encoding="utf-8")

    def advance(self, step: int, images: int) -> None:
        """Count a step of so many images (over all processes)."""
        self._images += images
        if self.main:
            self._progress.update(self._task, completed=step)

    def rate(self) -> float:
        """Images a second since the run started or was resumed."""
        return self._images / max(time.monotonic() - self._started, 1e-9)

    def training(
        self, step: int, epoch: int, loss: float, learning_rate: float, figures: dict[str, float] | None = None
    ) -> None:
        """Log the loss of a step, and further figures by name."""
        if not self.main:
            return
        rate = self.rate()
        values = {"loss": loss, "learning_rate": learning_rate, "images_per_second": rate, **(figures or {})}
        self._write({"step": step, "epoch": epoch, **values})
        for name, value in values.items():
            self._curves.add_scalar(f"training/{name}", value, step)
        state = f"loss {loss:.4f} · {rate:.0f} images/s"
        self._progress.update(self._task, state=state)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._spoke > QUIET_SECONDS:
            self._spoke = now
            left = (now - self._started) / max(step - self._first, 1) * (self.total - step)
            self.console.print(f"step {step} of {self.total} · {state} · {left:.0f} s left", highlight=False)

    def validation(self, step: int, epoch: int, name: str, metrics: dict[str, float]) -> None:
        """Log the accuracy of a model, such as `int8` or `float`, and print it."""
        if not self.main:
            return
        self._write({"step": step, "epoch": epoch, name: metrics})
        for metric, value in metrics.items():
            self._curves.add_scalar(f"{name}/{metric}", value, step)
        place = f"epoch {epoch} · step {step} of {self.total} · " if step else ""
        self.console.print(f"{place}{name}: {described(metrics)}", highlight=False)

    def _write(self, record: dict[str, Any]) -> None:
        self._lines.write(json.dumps(record | {"time": round(time.time(), 3)}) + "\n")
        self._lines.flush()

    def close(self) -> None:
        """Stop the bar and close the files."""
        if self.main:
            self._progress.stop()
            self._lines.close()
            self._curves.close()
