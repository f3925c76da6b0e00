"""A runtime's account of an operator that it ran."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerExecution:
    """The way in which the runtime executed a layer."""

    layer: str
    precision: str
    kernel: str
    integer: bool
    """True if an integer kernel ran."""
    stored: bool = False
    """True if the kernel read integer weights, whatever it computed in."""
