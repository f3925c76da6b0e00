"""The record of a run: the experiment that it was started with, which a resumed run must match."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from halfeven.cli.run import RunContext
from halfeven.config import Experiment, as_dict
from halfeven.errors import CheckpointError, ConfigError
from halfeven.files import json_text, write_atomically
from halfeven.options import Options, up_to_date
from halfeven.quantization.own_class import OwnClass, plain_values

MAY_CHANGE = (
    "device.kind",
    "device.threads",
    "export",
    "data.workers",
    "data.prefetch",
    "data.on_bad_sample",
    "data.root",
    "pretraining.log_every",
    "pretraining.save_every",
    "training.log_every",
    "training.save_every",
    "ptq.memory",
    "ptq.cache_folder",
)
"""Fields that may differ when a run is resumed: they do not change its result."""


def recorded_facts(context: RunContext, command: str) -> dict[str, Any]:
    """Return the contents of the record of a run: the command and all options."""
    return {"command": command, **as_dict(context.experiment)}


def write_record(path: Path, facts: dict[str, Any]) -> None:
    """Write the record of a run to its file."""
    text = json_text(facts, indent=2) + "\n"
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_record(path: Path) -> dict[str, Any]:
    """Return the options that a run was started with, from its file."""
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(recorded, dict):
            raise ValueError(f"it holds a {type(recorded).__name__}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), so nothing says with which options the run was started, and it cannot be "
            "resumed. Put the file back from a copy, or give --overwrite to start anew."
        ) from error
    return recorded


def check_same_run(recorded: dict[str, Any], present: dict[str, Any], folder: Path) -> None:
    """Raise ConfigError where a run is resumed with other options: its result would match neither run."""
    past = as_json({"command": "train", **_in_current_spelling(Experiment, recorded)})
    differing = [
        f"{name} was {json.dumps(was)} and is {json.dumps(now)}"
        for name, was, now in _differences("", past, as_json(present))
        if not _may_change(name)
    ]
    if differing:
        raise ConfigError(
            f"The run in {folder} was started with other options: {'; '.join(differing)}. Resumed with these, "
            "the result would match neither run. Give the options it was started with, or --overwrite to start anew."
        )


def _may_change(name: str) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in MAY_CHANGE)


def _in_current_spelling(kind: Any, recorded: Any) -> Any:
    """Return recorded options as this version spells them; `kind` is the type of the field that they were."""
    if isinstance(recorded, list | tuple):
        member = next(iter(get_args(kind)), None)
        return tuple(_in_current_spelling(member, item) for item in recorded)
    if not (isinstance(recorded, dict) and isinstance(kind, type) and issubclass(kind, Options)):
        return recorded
    hints = get_type_hints(kind)
    tupled = {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}
    # The user has not written the record, so a warning would ask for a change that cannot be made.
    current = up_to_date(kind, tupled, warn=False)
    # A field that came with a later version than the run's has its default.
    for field in dataclasses.fields(cast(Any, kind)):
        if field.default is not dataclasses.MISSING:
            current.setdefault(field.name, field.default)
    return {name: _in_current_spelling(hints.get(name), _without_code(value)) for name, value in current.items()}


def _without_code(value: Any) -> Any:
    """Return a user's class by name and version, as records hold it; any other value as it is."""
    return plain_values(value) if isinstance(value, OwnClass) else value


def as_json(values: Any) -> Any:
    """Return values as JSON gives them back."""
    return json.loads(json_text(values))


def _differences(name: str, was: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(was, dict) and isinstance(now, dict):
        for key in {**was, **now}:
            yield from _differences(f"{name}.{key}" if name else key, was.get(key), now.get(key))
    elif was != now:
        yield name, was, now
