"""Time layers in integers and in float, by the runtime's own profiles of the file and of the float file."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from halfeven.runtimes.layer_execution import KernelTime
from halfeven.runtimes.runtime import DeployedFile

SLOWER_BY = 1.2
"""Factor from which a layer counts as slower in integers: a profile's own fluctuation is smaller."""

PROFILES = 3
"""Largest number of profiles of a file."""

STEADY_RATIO = 1.5
"""Sum of a profile's kernels, over the time of a run, up to which a single profile is enough."""

SMALLEST_SHARE = 0.01
"""Smallest loss of a layer, over the float model's time, that counts."""


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of a layer's kernel in both files, for one batch."""

    name: str
    deployed: float
    floating: float
    integer: bool
    """True if the deployed file computes it in integers."""


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of a file and of its layers, beside those of the float file."""

    deployed: float
    """Milliseconds of the whole file."""
    float32: float
    """Milliseconds of the float file in float32."""
    float_default: float
    """Milliseconds of the float file in the runtime's default precision: bfloat16 where the processor has it."""
    layers: tuple[LayerTime, ...] = ()
    """In the order in which they run; empty where the runtime gives no profile."""

    def ratio_with(self, in_float: Collection[str], moved_in_float: float = 0.0) -> float:
        """Return the estimated time of the file with some layers in float, over the float file's in default precision.

        Args:
            in_float: names of these layers.
            moved_in_float: share of the traffic of activations that is in float, from 0 to 1. The time outside of
                layers goes from the deployed file's to the float file's with this share.
        """
        chosen = [layer for layer in self.layers if layer.integer and layer.name in in_float]
        deployed = sum(layer.deployed for layer in self.layers)
        floating = sum(layer.floating for layer in self.layers)
        # Profiled kernels may add up to more than an unprofiled run takes: then each has its share of that run.
        share = min(1.0, self.deployed / deployed) if deployed else 1.0
        float_share = min(1.0, self.float32 / floating) if floating else 1.0
        # Each chosen layer exchanges its time in integers for its time in float.
        added = sum(float_share * layer.floating - share * layer.deployed for layer in chosen)
        # The time outside of layers: elementwise operators, conversions, copies.
        rest = self.deployed - share * deployed
        floating_rest = self.float32 - float_share * floating
        return (self.deployed + added + moved_in_float * (floating_rest - rest)) / self.float_default

    def slower(self) -> list[LayerTime]:
        """Return the layers whose integer kernel takes longer than the float kernel, the largest loss first."""
        least = SMALLEST_SHARE * self.float_default
        found = [
            layer
            for layer in self.layers
            if layer.integer and layer.deployed > SLOWER_BY * layer.floating and layer.deployed - layer.floating > least
        ]
        return sorted(found, key=lambda layer: layer.floating - layer.deployed)


def steady_kernel_times(file: DeployedFile, inputs: Sequence[Tensor], whole: float) -> list[KernelTime]:
    """Return the runtime's profile of a file, without what other programs on the processor add to single kernels.

    Where the kernels add up to far more than the file takes, further profiles are made, and each kernel has its
    shortest time.

    Args:
        file: the file.
        inputs: a batch.
        whole: milliseconds of a run without a profile.
    """
    found = file.kernel_times(inputs)
    for _ in range(PROFILES - 1):
        if sum(kernel.milliseconds for kernel in found) <= STEADY_RATIO * whole:
            break
        found = shortest_times(found, file.kernel_times(inputs))
    return found


def shortest_times(found: list[KernelTime], again: list[KernelTime]) -> list[KernelTime]:
    """Return the shorter time of each kernel in two profiles of a file."""
    # On a busy machine a profile may lack kernels.
    if [kernel.name for kernel in again] != [kernel.name for kernel in found]:
        return found
    return [min(pair, key=lambda kernel: kernel.milliseconds) for pair in zip(found, again, strict=True)]


def time_layers(
    deployed: Sequence[KernelTime], floating: Sequence[KernelTime], names: Sequence[str]
) -> tuple[LayerTime, ...]:
    """Return the times of the named layers that both profiles have.

    Layers of a float file have no names. Both files are of one graph, so their convolutions run in one order, and so do
    their products; where a runtime has merged some in one file alone, the numbers differ, and none of that kind is
    returned.

    Args:
        deployed: the profile of the quantized file.
        floating: the profile of the float file of the same model.
        names: the layers, as the quantized file calls them.
    """
    return tuple(
        layer
        for kind in LAYER_KERNELS
        for layer in _paired_times(_kernels_matching(deployed, kind), _kernels_matching(floating, kind), names)
    )


# OpenVINO's "Convert" is a change of type, not a convolution.
LAYER_KERNELS = (r"conv(?!ert)", r"matmul|gemm|fullyconnected")
"""Patterns of the runtimes' words for kernels: convolutions, and products."""


def _kernels_matching(kernels: Iterable[KernelTime], pattern: str) -> list[KernelTime]:
    return [kernel for kernel in kernels if re.search(pattern, kernel.kind, re.IGNORECASE)]


def _paired_times(
    mine: Sequence[KernelTime], others: Sequence[KernelTime], names: Sequence[str]
) -> Iterator[LayerTime]:
    if len(mine) != len(others):
        return
    for kernel, other in zip(mine, others, strict=True):
        name = next((name for one in (*kernel.layers, kernel.name) if (name := _owning_layer(one, names))), None)
        if name is not None:
            yield LayerTime(name, kernel.milliseconds, other.milliseconds, kernel.integer)


def _owning_layer(operator: str, names: Sequence[str]) -> str | None:
    """Return the layer that an operator of a file belongs to: runtimes add suffixes to its name."""
    if operator in names:
        return operator
    begun = [name for name in names if operator.startswith((f"{name}/", f"{name}_"))]
    return max(begun, key=len, default=None)
