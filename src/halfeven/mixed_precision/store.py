"""Keep what a search has measured in a folder, so that an interrupted search goes on where it was."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from halfeven.errors import CheckpointError, ConfigError
from halfeven.files import json_text, storing, write_atomically

MEASUREMENTS_FILE = "search.json"

SAME_SUM = 1e-3
"""Relative difference up to which sums of answers count as equal: their last digits change with the number of
threads."""


class MeasurementStore:
    """Measurements by name, written to a file as they come.

    Args:
        folder: where the file lies; None: nothing is written.
        facts: what the measurements depend on.

    Raises:
        ConfigError: the folder holds the measurements of another search.
        CheckpointError: its file is damaged.
    """

    def __init__(self, folder: Path | None, facts: dict[str, Any]) -> None:
        self.path = None if folder is None else folder / MEASUREMENTS_FILE
        # As they are read back, with lists for tuples, so that they compare equal.
        self.facts = json.loads(json_text(facts))
        self.found: dict[str, Any] = {}
        if self.path is not None and self.path.is_file():
            self._read_measurements(self.path)

    def _read_measurements(self, path: Path) -> None:
        """Read the measurements in a file, and check that they belong to this search."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            recorded = values["facts"]
            self.found = dict(values["found"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({type(error).__name__}), so the search cannot go on from it. Delete it, and the "
                "search starts anew."
            ) from error
        names = {**recorded, **self.facts}
        if differing := [name for name in names if not _same_fact(recorded.get(name), self.facts.get(name))]:
            raise ConfigError(
                f"{path} holds the measurements of another search ({', '.join(differing)} differ), and they would not "
                "fit this one. Give another resume_dir, or delete that file to start anew."
            )

    def measured(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a measurement: that in the file, or else a new measurement, which is written.

        Args:
            name: what is measured.
            measure: measures it; returns plain values.
        """
        if name not in self.found:
            self.found[name] = measure()
            self._write_measurements()
        return self.found[name]

    def _write_measurements(self) -> None:
        if self.path is None:
            return
        text = json_text({"facts": self.facts, "found": self.found})
        with storing(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _same_fact(was: Any, now: Any) -> bool:
    """Return True for equal facts, and for numbers whose difference rounding explains."""
    if isinstance(was, list) and isinstance(now, list):
        return len(was) == len(now) and all(map(_same_fact, was, now))
    if isinstance(was, float) and isinstance(now, float):
        return math.isclose(was, now, rel_tol=SAME_SUM, abs_tol=SAME_SUM)
    return bool(was == now)
