"""Run the file of a quantized model: where it parts from the simulation, what is in float there, and its times."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from halfeven.errors import HalfevenError
from halfeven.graph.batches import Inputs
from halfeven.graph.copying import copy_model
from halfeven.graph.torch_private import pytree
from halfeven.placement.insertion import plan_of
from halfeven.runtimes.export import export
from halfeven.runtimes.runtime import runtime_named
from halfeven.temporary import temporary_folder
from halfeven.verification.layer_times import LayerTime
from halfeven.verification.report import Report
from halfeven.verification.verify import verify

RUN_SAMPLES = 8
"""Samples that the file is run on: the exact simulation beside it takes long."""
PARTED_SHARE = 0.01
"""Share of a tensor's integers that differ, given equal integers before it, from which file and simulation part
there."""


@dataclass(frozen=True)
class FileFacts:
    """Measurements of a model's file in its runtime."""

    notes: tuple[str, ...] = ()
    latency_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds of the file and of the float file; empty where they were not run."""
    layers: tuple[LayerTime, ...] = ()
    """By the runtime's own profile."""


def run_file(qmodel: nn.Module, inputs: Inputs, log: Callable[[str], None]) -> FileFacts:
    """Write the file of a model for its target, run it on some samples, and return what was measured.

    Args:
        qmodel: a calibrated model, which stays as it is.
        inputs: a batch, of which the first samples are taken.
        log: called before the work.
    """
    log("Writing the model's file and running it ...")
    runtime = runtime_named(plan_of(qmodel).options.target)
    args, kwargs = _first_of(inputs)
    model = copy_model(qmodel).cpu().eval()
    try:
        with temporary_folder() as folder:
            path = export(model, folder / f"model{next(iter(runtime.writers))}")
            report = verify(model, path, [kwargs or args], timed=runtime.exact is not None)
    except HalfevenError as error:
        return FileFacts((f"There is no file to compare with: {str(error).splitlines()[0]}",))
    return FileFacts(tuple(_file_notes(report)), report.latency_ms, tuple(report.layer_times))


def _first_of(inputs: Inputs) -> Inputs:
    """Return the first samples of a batch, on the CPU and in float32, as the file takes them."""
    tensors = [x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim]
    size = max((len(x) for x in tensors), default=0)

    def part(x: Tensor) -> Tensor:
        first = (x[:RUN_SAMPLES] if x.ndim and len(x) == size else x).cpu()
        return first.float() if first.is_floating_point() else first

    first: Inputs = pytree.tree_map_only(Tensor, part, inputs)
    return first


def _file_notes(report: Report) -> list[str]:
    parted = [t for t in report.tensors if t.different_float_alone > PARTED_SHARE * t.count]
    found = []
    if parted:
        share = parted[0].different_float_alone / parted[0].count
        why = ": sums of 8-bit products overflow on this processor" if report.overflows else ""
        found.append(
            f"The file parts from the simulation first at {parted[0].name}, where {share:.1%} of the integers differ "
            f"given the same integers before it{why}."
        )
    found += report.findings
    if report.float_layers:
        more = f" and {len(report.float_layers) - 1} more" if len(report.float_layers) > 1 else ""
        found.append(f"In float in the file: {report.float_layers[0]}{more}.")
    if report.latency_ms:
        slowest = f" Slowest: {'; '.join(report.slowest_kernels)}." if report.slowest_kernels else ""
        found.append(
            f"The file takes {report.latency_ms['deployed']:.3f} ms for {report.latency_batch} samples, the float file "
            f"{report.latency_ms['float']:.3f} ms in float32.{slowest}"
        )
    return [*found, *report.slower]
