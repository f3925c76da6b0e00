"""Refuse options that no command has, and name the nearest ones."""

from collections.abc import Sequence
from difflib import SequenceMatcher

from halfeven.nearest import joined_by_or, similar
from halfeven.options import report

OTHER_NAMES = {
    "lr": "learning-rate",
    "max-lr": "learning-rate",
    "bs": "batch-size",
    "batch": "batch-size",
    "wd": "weight-decay",
    "epoch": "epochs",
    "iterations": "max-steps",
    "lr-scheduler": "schedule",
    "bits": "quantization.scheme",
    "runtime": "quantization.target",
    "backend": "quantization.target",
    "format": "formats",
    "checkpoint": "model.weights",
    "pretrained": "model.weights",
    "classes": "num-classes",
    "img-size": "image-size",
    "crop-size": "image-size",
    "dataset": "data.source",
    "data": "data.root",
    "data-dir": "data.root",
    "num-workers": "workers",
    "gpu": "device.kind",
    "output": "work-dir",
    "output-dir": "work-dir",
    "out": "work-dir",
    "force": "overwrite",
    "fp16": "amp",
}
"""Other tools' names -> the last words, or all words, of ours."""

MAX_NAMED_OPTIONS = 4
"""Largest number of options that a message names."""


def check_known(command: str, arguments: Sequence[str], options: Sequence[str]) -> None:
    """Refuse arguments with dashes that are none of a command's options.

    Args:
        command: its name.
        arguments: those of the command.
        options: what it reads, with dashes, those that matter first before the others.

    Raises:
        ConfigError: an option is not among them.
    """
    given = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    # A number in the middle is the place of a rule in the config; tyro knows how many there are.
    plain = (option for option in dict.fromkeys(given) if not any(part.isdigit() for part in option.split(".")))
    unknown = [option for option in plain if option.replace("_", "-") not in options]
    report([_sentence(command, option, options) for option in unknown])


def _sentence(command: str, option: str, options: Sequence[str]) -> str:
    if near := nearest_options(option.replace("_", "-"), options):
        return f"there is no {option}. Did you mean {joined_by_or(near)}?"
    config = " CONFIG" if any("." in one for one in options) else ""  # its fields are options with a dot
    return f"there is no {option}. `halfeven {command}{config} --help` lists all options."


def nearest_options(option: str, options: Sequence[str]) -> list[str]:
    """Return the options that a wrong one most likely means, the nearest first: by its last word, then by its letters.

    Args:
        option: the wrong option, with dashes.
        options: the right ones, those that matter first before the others.
    """
    word = _last_word(option)
    meant = {word, OTHER_NAMES.get(word, word)}
    found = [one for one in options if meant & {_last_word(one), one.removeprefix("--")}]
    if not found:
        words = similar(word, dict.fromkeys(map(_last_word, options)), 2, cutoff=0.75)
        found = [one for one in options if _last_word(one) in words]
    if not found:
        found = similar(option, options, 2, cutoff=0.75)
    in_same_part = [one for one in found if "." in option and _part(one) == _part(option)]
    return (in_same_part or sorted(found, key=lambda one: -_likeness(option, one)))[:MAX_NAMED_OPTIONS]


def _last_word(option: str) -> str:
    return option.removeprefix("--").rpartition(".")[2]


def _part(option: str) -> str:
    return option.rpartition(".")[0]


def _likeness(left: str, right: str) -> float:
    """Return the likeness of the parts before the last word; equal parts keep their order in a sort."""
    return SequenceMatcher(None, _part(left), _part(right)).ratio() if "." in left else 0.0
