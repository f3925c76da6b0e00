"""A decision with its reason: what the recipes are made of, to be read before anything is done."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A step that is taken or left out."""

    taken: bool
    reason: str


def switched(value: str) -> Choice | None:
    """The user's choice, or None where it is left to us ("auto")."""
    return None if value == "auto" else Choice(value not in ("off", "keep"), "as the options say")


def table(title: str, choices: Mapping[str, Choice]) -> str:
    """The choices, one a line, with yes or no and the reason."""
    width = max(map(len, choices))
    lines = [f"  {name:{width}}  {'yes' if c.taken else 'no ':3}  {c.reason}" for name, c in choices.items()]
    return "\n".join([title, *lines])
