"""The table of a campaign: a row for each part."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class Row:
    """The result of a part: how many faults were tried, how many were survived, and what was lost."""

    part: str
    tries: int = 0
    survived: int = 0
    lost: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, name: str, problems: list[str], tries: int = 1) -> None:
        """Count a run with its faults: survived where it has no problems."""
        self.tries += tries
        self.survived += 0 if problems else tries
        self.lost += [f"{name}: {problem}" for problem in problems]


@dataclass(frozen=True)
class Campaign:
    """The settings that all parts share."""

    folder: Path
    """Where the parts work."""
    seed: int
    tries: int | None
    """Tries of each part; None: as many as the part has by default."""
    log: Callable[[str], None]
    """Prints a line on the way."""

    def tries_of(self, usual: int) -> int:
        """Return the tries of a part that usually has this many."""
        return usual if self.tries is None else self.tries


MOST_LOST = 20
"""Largest number of losses of a part that are printed; the file has all."""


def show(rows: list[Row], console: Console) -> None:
    """Print the table, and below it what was lost."""
    table = Table("part", "tries", "survived", "lost", "notes")
    for row in rows:
        table.add_row(row.part, str(row.tries), str(row.survived), str(row.tries - row.survived), "; ".join(row.notes))
    console.print(table)
    for row in rows:
        for problem in row.lost[:MOST_LOST]:
            console.print(f"{row.part}: {problem}", markup=False, highlight=False, soft_wrap=True)
