"""A runtime's account of an operator that it ran: the kernel, and the time that it took."""

from collections.abc import Sequence
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

    @property
    def is_known(self) -> bool:
        """Return False for a layer that the runtime's account does not have."""
        return self.precision != "unknown"


@dataclass(frozen=True)
class KernelTime:
    """The time that a runtime's own profile gives for a kernel that it ran."""

    name: str
    """The kernel's name in the runtime, which is that of a layer where the kernel is a layer's."""
    layers: tuple[str, ...]
    """The operators of the file that the kernel was made of, as far as the runtime says."""
    kind: str
    """The runtime's word for the operator, such as "Convolution" or "QLinearConv"."""
    kernel: str
    """The kernel's own name; "" where the runtime has no other than `kind`."""
    precision: str
    """The type that it computes in, as the runtime says it: "u8", "i8", "int8", "f32" or "float32"."""
    milliseconds: float
    """Time of a run: the median of the profiled runs, or their mean where the runtime keeps no median."""
    integer: bool
    """True if it computes with integers, or moves them."""


def slowest(times: Sequence[KernelTime], count: int) -> list[KernelTime]:
    """Return the kernels that take the longest, the slowest first."""
    return sorted(times, key=lambda time: -time.milliseconds)[:count]
