"""Reconstruction: layer after layer, or block after block, the quantized model learns to give what the float one gives.

AdaRound (arXiv 2004.10568; white paper, section 3.4) learns the rounding of one layer's weight; BRECQ (arXiv
2102.05426) does so for blocks; QDrop (arXiv 2203.05740) leaves activations in float at random meanwhile, and learns
their scales. What comes in is what the quantized layers before give; the target is what the float model gives at the
same place. Only inputs are needed, no labels.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from halfeven.errors import CalibrationError
from halfeven.evaluation import evaluating
from halfeven.layerwise.activations import check_float_weights, in_float, streams
from halfeven.layerwise.blocks import Granularity, Unit, units
from halfeven.layerwise.cache import Cache, Stored, store_inputs
from halfeven.placement.make_plan import qualified, regions
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction.optimize import Outcome, decibels, learn
from halfeven.ptq.reconstruction.resume import Saved
from halfeven.quantization.quantizer import quantizers
from halfeven.renamed import renamed_parameters

"""Steps of a unit where the options leave the number open."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class UnitReport:
    """How well a unit gives what its float form gives, in dB (signal to quantization noise ratio)."""

    name: str
    layers: int
    before: float
    """With weights rounded to nearest."""
    after: float
    undecided: float
    """Share of the roundings that were rounded while the regularizer had not driven them to 0 or 1."""
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.name}: SQNR {self.before:.2f} -> {self.after:.2f} dB "
            f"({self.layers} layer{'s'[: self.layers > 1]}, {self.seconds:.1f} s)"
        )


@dataclass(frozen=True)
class ReconstructionReport:
    """What a reconstruction gained, unit by unit."""

    units: tuple[UnitReport, ...]
    iterations: int
    bytes_on_disk: int = 0
    """Stored activations that the memory bound sent to the disk, in all."""

    def __str__(self) -> str:
        head = f"Reconstruction of {len(self.units)} units, {self.iterations} steps each:"
        disk = [f"  {self.bytes_on_disk / 1e9:.1f} GB of activations lay on the disk."] if self.bytes_on_disk else []
        return "\n".join([head, *(f"  {unit}" for unit in self.units), *disk])


@renamed_parameters(say="log", state="resume_dir")
def adaround(
    qmodel: nn.Module,
    loader: Iterable[Any],
    *,
    options: PTQOptions | None = None,
    batches: int | None = None,
    resume_dir: Path | None = None,
    log: Log | None = None,
) -> ReconstructionReport:
    """AdaRound: learn, layer by layer, whether each weight is rounded up or down.

    Weight ranges must be set before (`calibrate`), and are final afterwards: a range that is set anew would undo the
    rounding. Ranges of activations may be set again by `calibrate`.

    Args:
        qmodel: a calibrated model; it is changed in place.
        loader: batches as for `calibrate`; 500 to 1,000 samples suffice (white paper, section 3.4).
        options: `iterations`, `batch_size`, rates, memory bound and seed; what AdaRound does not learn is ignored.
        batches: how many of the loader's batches to take; None: all.
        resume_dir: folder for finished layers. A killed run that is started again goes on from it, and ends with the
            same weights as an uninterrupted run.
        log: called with a line about each layer when it is finished.

    Raises:
        AlgorithmError: the rounding was learned before.
        CalibrationError: the loader gave nothing, or a range is not set.
        CheckpointError: `resume_dir` belongs to another run.
    """
    options = dataclasses.replace(options or PTQOptions(), drop=0.0, scale_rate=0.0, bias_rate=0.0)
    return _reconstruct(qmodel, loader, "layers", options, batches, resume_dir, log)


@renamed_parameters(say="log", state="resume_dir")
def reconstruct(
    qmodel: nn.Module,
    loader: Iterable[Any],
    *,
    options: PTQOptions | None = None,
    batches: int | None = None,
    resume_dir: Path | None = None,
    log: Log | None = None,
) -> ReconstructionReport:
    """Block reconstruction: learn the rounding and the activation scales of block after block, together.

    Weight and activation ranges must be set before (`calibrate`); afterwards they are final. Blocks are found in the
    graph (`halfeven.layerwise.blocks`). Biases are learned too with `options.bias_rate`, weight scales with
    `options.learn_weight_scales`. Arguments and errors are those of `adaround`.
    """
    return _reconstruct(qmodel, loader, "blocks", options or PTQOptions(), batches, resume_dir, log)


def _reconstruct(
    qmodel: nn.Module,
    loader: Iterable[Any],
    granularity: Granularity,
    options: PTQOptions,
    batches: int | None,
    resume_dir: Path | None,
    log: Log | None,
) -> ReconstructionReport:
    options = dataclasses.replace(options, iterations=options.steps)
    check_float_weights(qmodel, "Reconstruction")
    _check_calibrated(qmodel)
    cache = Cache(options.memory * 1e9, options.cache_folder)
    reports: list[UnitReport] = []
    found = [(prefix, units(region, granularity)) for prefix, region in regions(qmodel).items()]
    with evaluating(qmodel), _parameters_at_rest(qmodel), _bar(sum(len(parts) for _, parts in found)) as advance:
        inputs = store_inputs(loader, options.batch_size, cache, batches)
        saved = Saved.open(resume_dir, qmodel, inputs, options, granularity)
        for prefix, parts in found:
            for report in _walk(qmodel, prefix, parts, inputs, cache, options, saved):
                reports.append(report)
                advance(report)
                if log is not None:
                    log(f"  {report}")
    return ReconstructionReport(tuple(reports), options.steps, cache.on_disk)


def _walk(
    qmodel: nn.Module,
    prefix: str,
    parts: list[Unit],
    inputs: list[Stored],
    cache: Cache,
    options: PTQOptions,
    saved: Saved,
) -> Iterator[UnitReport]:
    """Reconstruct the units of a region, each on what the finished ones before it give."""
    floats, quantized = streams(qmodel, prefix, inputs, cache)
    for index, unit in enumerate(parts):
        begin = time.perf_counter()
        name = qualified(prefix, unit.name)
        with in_float(unit):
            floats.advance(unit)
        outcome = saved.restore(name, unit)
        if outcome is None:
            outcome = learn(unit, floats, quantized, options, options.seed + index) if unit.layers else Outcome(0, 0, 0)
            saved.keep(name, unit, outcome)
        quantized.advance(unit)
        for stream in (floats, quantized):
            stream.forget(parts[: index + 1])
        layers, seconds = len(unit.layers), time.perf_counter() - begin
        yield UnitReport(name, layers, decibels(outcome.before), decibels(outcome.after), outcome.undecided, seconds)


def _check_calibrated(qmodel: nn.Module) -> None:
    unset = [name for name, q in quantizers(qmodel).items() if not q.state.has_range]
    if unset:
        raise CalibrationError(
            f"{len(unset)} quantizers have no range yet, {unset[0]} for one, so there is no grid to round to. "
            "Run halfeven.calibrate(qmodel, loader) before the reconstruction."
        )


@contextmanager
def _parameters_at_rest(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients but those that a unit learns; afterwards they ask as before."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(asked.get(parameter, True))


@contextmanager
def _bar(total: int) -> Iterator[Callable[[UnitReport], None]]:
    """A progress bar on the terminal, with the error of the last unit before and after; nothing where there is none."""
    console = Console(stderr=True)
    columns = (
        TextColumn("reconstruction"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda report: progress.update(task, advance=1, description=str(report))
