"""Define decisions with their reasons, which recipes consist of and print before any step."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """The decision to carry a step out or to leave it out, with the reason."""

    enabled: bool
    reason: str


def decision_of_switch(value: str) -> Decision | None:
    """Return the user's decision on a step, or None where the option says "auto"."""
    return None if value == "auto" else Decision(value not in ("off", "keep"), "as the options say")


def table(title: str, decisions: Mapping[str, Decision]) -> str:
    """Return a title and, below it, a line for each step: its name, yes or no, and the reason."""
    width = max(map(len, decisions))
    lines = [f"  {name:{width}}  {'yes' if d.enabled else 'no ':3}  {d.reason}" for name, d in decisions.items()]
    return "\n".join([title, *lines])
