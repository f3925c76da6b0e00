"""The nearest right name to a misspelt one, for messages."""

import difflib
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

OTHER_WORDS = {
    **dict.fromkeys(("false", "no", "none", "0", "never"), "off"),
    **dict.fromkeys(("true", "yes", "1", "always"), "on"),
    "gpu": "cuda",
    "fp32": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
}
"""Other tools' words for choices of ours, in lower case."""


def shown(value: object) -> str:
    """Return a value as it is written in Python, texts in double quotes."""
    if isinstance(value, tuple):
        return f"({', '.join(map(shown, value))}{',' if len(value) == 1 else ''})"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def nearest(value: object, choices: Sequence[Any]) -> Any:
    """Return the choice that a misspelt or mistyped value most likely means, or None."""
    by_name = {_lower_case(choice): choice for choice in choices}
    word = _lower_case(value)
    words = [word, OTHER_WORDS.get(word, word)]
    if found := [by_name[one] for one in words if one in by_name]:
        return found[0]
    near = similar(word, by_name, 1)
    return by_name[near[0]] if near else None


def did_you_mean(name: str, choices: Iterable[str], most: int = 1, otherwise: str | None = None) -> str:
    """Return the sentence that names the nearest choices.

    Args:
        name: the misspelt name.
        choices: the right names.
        most: largest number of names in the sentence.
        otherwise: the sentence where no name is near; None: it lists all choices.
    """
    choices = list(choices)
    if near := similar(name, choices, most):
        return f"Did you mean {joined_by_or(near)}?"
    return f"There are {', '.join(choices)}." if otherwise is None else otherwise


def similar(name: str, choices: Iterable[str], most: int, cutoff: float = 0.6) -> list[str]:
    """Return the most similar names, at most `most`, the nearest first.

    Args:
        name: the misspelt name.
        choices: the right names.
        most: largest number of names.
        cutoff: smallest similarity, from 0 to 1.
    """
    return difflib.get_close_matches(name, list(choices), n=most, cutoff=cutoff)


MAX_COMPARED_NAMES = 2000
"""Largest number of names in a folder that are compared with a misspelt one."""


def did_you_mean_path(path: Path) -> str:
    """Return the sentence that names the existing path which a wrong one most likely means, with a space before it.

    It is empty where no path is near.
    """
    near = nearest_path(path)
    return "" if near is None else f" Did you mean {near}?"


def nearest_path(path: Path) -> Path | None:
    """Return the existing path whose names are nearest to those of a wrong one, folder by folder; None without any."""
    found = Path(path.anchor)
    for name in path.relative_to(path.anchor).parts:
        there = found / name
        try:
            if not there.exists():
                names = [one.name for one in islice(found.iterdir(), MAX_COMPARED_NAMES)]
                there = found / similar(name, names, 1)[0]
        except (OSError, IndexError):  # a file, a folder that cannot be read, or no name that is near
            return None
        found = there
    return found


def joined_by_or(words: Iterable[str]) -> str:
    """Return words as a list in a sentence: "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _lower_case(value: object) -> str:
    return str(value).lower()
