"""The nearest right name to a misspelt one, for messages."""

import difflib
from collections.abc import Iterable, Sequence
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


def joined_by_or(words: Iterable[str]) -> str:
    """Return words as a list in a sentence: "a, b or c"."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _lower_case(value: object) -> str:
    return str(value).lower()
