"""The log of a training run: a progress bar, a file of JSON lines, and TensorBoard's curves."""

import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor

from halfeven.files import json_text, storing, write_atomically
from halfeven.imports import extra

QUIET_SECONDS = 30.0
"""Seconds between printed lines where there is no terminal to draw a bar in."""


def plain_console(*, quiet: bool = False) -> Console:
    """Return a console that prints texts as they are: in a path, "[bold]" and ":smile:" are letters."""
    return Console(quiet=quiet, markup=False, emoji=False)


def metrics_text(metrics: dict[str, float]) -> str:
    """Return metrics as text, for example "top1 89.99, top5 99.88"."""
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def _named_curves(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{metric}": value for metric, value in metrics.items()}


class JSONLinesTracker(GeneralTracker):  # type: ignore[misc]
    """Accelerate's tracker of a file of JSON lines, `log.jsonl`.

    Args:
        folder: folder of the file.
        purge_step: first step that the run will log: lines of this step and of later ones, which an interrupted run has
            written, are dropped.
    """

    name = "json_lines"
    requires_logging_directory = True

    def __init__(self, folder: Path, purge_step: int) -> None:
        super().__init__()
        self.path = folder / "log.jsonl"
        self.purge_step = purge_step

    def start(self) -> None:
        """Open the file."""
        with storing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_later_lines()
            self.lines = self.path.open("a", encoding="utf-8")

    def _remove_later_lines(self) -> None:
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # a line cut short by the interruption
                continue
            if record.get("step", 0) < self.purge_step:
                kept.append(line)
        write_atomically(self.path, lambda partial: partial.write_text("".join(kept), encoding="utf-8"))

    @property
    def tracker(self) -> Any:
        """The open file."""
        return self.lines

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Write a line."""
        with storing(self.path):
            self.lines.write(json_text({"step": step, **values, "time": round(time.time(), 3)}) + "\n")
            # An interruption then loses the line that is being written at most.
            self.lines.flush()

    def finish(self) -> None:
        """Close the file."""
        self.lines.close()


def _hide_kept_error(shown_by: Callable[[threading.ExceptHookArgs], Any], args: threading.ExceptHookArgs) -> None:
    """Show the error that ended a thread, unless the thread keeps it: TensorBoard raises it at the next curve."""
    if getattr(args.thread, "exception", None) is not args.exc_value:
        shown_by(args)


class RunLog:
    """The bar and the log files of a run. Only the main process writes.

    Args:
        folder: folder for `log.jsonl` and `tensorboard/`.
        title: title of the bar.
        total: number of optimizer steps in the run.
        step: number of steps taken before.
        resumed: True for a run that goes on: the log of steps up to `step` is kept. Otherwise the log starts anew.
        console: where the bar and the validations are printed.
        main: True on the main process.
        constants: metrics that stay, by the model's name, such as the float model's: curves beside each validation.
    """

    def __init__(
        self,
        folder: Path,
        title: str,
        *,
        total: int,
        step: int,
        resumed: bool,
        console: Console,
        main: bool,
        constants: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self.console = console
        self.main = main
        self.constants = constants or {}
        self._one_chart = False
        self.total = total
        self._first = step
        self._started = time.monotonic()
        self._printed = self._started
        self._samples = 0
        purge_step = step + 1 if resumed else 0
        self._lines = JSONLinesTracker(folder, purge_step=purge_step)
        self._named_curves = TensorBoardTracker("tensorboard", folder, purge_step=purge_step)
        self._curves_folder = folder / "tensorboard"
        # TensorBoard writes in a thread. It keeps the error that ends it and raises it at the next curve, so that
        # Python need not print it too.
        self._hook_before = threading.excepthook
        if main:
            threading.excepthook = partial(_hide_kept_error, self._hook_before)
            self._lines.start()
            with extra("train", "Training"):  # TensorBoard is imported here
                self._named_curves.start()
        columns = (
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
        )
        hidden = not (main and console.is_terminal)
        self._progress = Progress(*columns, console=console, disable=hidden, transient=True)
        self._task = self._progress.add_task(title, total=total, completed=step, state="")
        self._progress.start()

    def advance(self, step: int, samples: int) -> None:
        """Count a step, and its samples over all processes."""
        self._samples += samples
        self._progress.update(self._task, completed=step)

    def rate(self) -> float:
        """Return the samples per second since the run started or was resumed."""
        return self._samples / max(time.monotonic() - self._started, 1e-9)

    def training(
        self, step: int, epoch: int, loss: float, learning_rate: float, figures: dict[str, float] | None = None
    ) -> None:
        """Log the loss of a step, and further figures by name."""
        rate = self.rate()
        values = {"loss": loss, "learning_rate": learning_rate, "samples_per_second": rate, **(figures or {})}
        self._record_line(
            step, {"epoch": epoch, **values}, {f"training/{name}": value for name, value in values.items()}
        )
        state = f"loss {loss:.4f} · {rate:.0f} samples/s"
        self._progress.update(self._task, state=state)
        now = time.monotonic()
        if self.main and not self.console.is_terminal and now - self._printed > QUIET_SECONDS:
            self._printed = now
            left = (now - self._started) / max(step - self._first, 1) * (self.total - step)
            self.console.print(f"step {step} of {self.total} · {state} · {left:.0f} s left", highlight=False)

    def validation(self, step: int, epoch: int, name: str, metrics: dict[str, float]) -> None:
        """Log and print the accuracy of a model, which is named, for example, `w8a8` or `float`."""
        curves = _named_curves(name, metrics)
        if step:
            for other, constant in self.constants.items():
                curves |= _named_curves(other, constant)
        self._record_line(step, {"epoch": epoch, name: metrics}, curves)
        if self.main:
            self._draw_in_one_chart(metrics)
            place = f"epoch {epoch} · step {step} of {self.total} · " if step else ""
            self.console.print(f"{place}{name}: {metrics_text(metrics)}", highlight=False)

    def histograms(self, step: int, found: Mapping[str, Tensor]) -> None:
        """Log the distributions of values, by name."""
        with storing(self._curves_folder):
            for name, values in found.items() if self.main else ():
                self._named_curves.tracker.add_histogram(f"quantizers/{name}", values, step)

    def _draw_in_one_chart(self, metrics: Mapping[str, float]) -> None:
        """Declare one chart of TensorBoard for each metric, with the curves of all models, float and quantized."""
        if not self._one_chart:
            charts = {metric: ["Multiline", [f".*/{re.escape(metric)}$"]] for metric in metrics}
            self._named_curves.tracker.add_custom_scalars({"float and quantized": charts})
            self._one_chart = True

    def close(self) -> None:
        """Stop the bar and close the files."""
        self._progress.stop()
        if self.main:
            try:
                self._lines.finish()
                with storing(self._curves_folder):
                    self._named_curves.finish()
            finally:
                threading.excepthook = self._hook_before

    def _record_line(self, step: int, line: dict[str, Any], curves: dict[str, float]) -> None:
        if self.main:
            self._lines.log(line, step)
            with storing(self._curves_folder):
                self._named_curves.log(curves, step)
