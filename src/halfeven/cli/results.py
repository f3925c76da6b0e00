"""The results of a command: the table of accuracies, and JSON for other programs."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from halfeven.cli.run import RunContext
from halfeven.errors import ConfigError
from halfeven.files import json_text, write_atomically
from halfeven.tasks.task import Metrics


def print_accuracies(
    context: RunContext, rows: dict[str, Metrics], files: Mapping[str, object], caption: str = ""
) -> None:
    """Print the accuracies as one table.

    Args:
        context: the run.
        rows: metrics by the model's name.
        files: the file of a model, by the same name.
        caption: a line below the table.
    """
    title = f"{len(context.datasets.validation)} validation samples"
    table = Table(title=title, title_justify="left", caption=caption or None, caption_justify="left")
    table.add_column("model")
    # What a checkpoint has recorded may be the metrics of another task.
    names = list(dict.fromkeys(metric for metrics in rows.values() for metric in metrics))
    for metric in names:
        table.add_column(f"{metric}, %", justify="right")
    table.add_column("file")
    for name, metrics in rows.items():
        cells = (f"{metrics[metric]:.2f}" if metric in metrics else "" for metric in names)
        table.add_row(name, *cells, str(files.get(name, "")))
    context.console.print(table)


def check_file(path: str, option: str) -> None:
    """Refuse a file of results that could not be written at the end of the work.

    Raises:
        ConfigError: its place is a folder, or it lies in no folder.
    """
    if not path:
        return
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    if Path(path).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            f"{option} {path} is no file that could be written, so the results would be lost after the work. Give the "
            "path of a file in a folder that you may write to."
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write results for other programs, and print where; null stands for NaN, which JSON does not have."""
    text = json_text(content, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    print(f"Wrote {path}.")
