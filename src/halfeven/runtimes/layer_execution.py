"""What a runtime says of an operator that it ran."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerExecution:
    """How the runtime executed a layer."""

    layer: str
    precision: str
    kernel: str
    integer: bool
    """Whether an integer kernel ran."""
    stored: bool = False
    """Whether it read integer weights, whatever it computed in."""
