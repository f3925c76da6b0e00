"""Reconstruction: the layers or blocks of the quantized model, in order, learn to give what the float model gives.

AdaRound (Nagel et al., arXiv:2004.10568; white paper, section 3.4, arXiv:2106.08295) learns the rounding of one layer's
weight. BRECQ (Li et al., arXiv:2102.05426) does so for blocks. QDrop (Wei et al., arXiv:2203.05740) leaves activations
in float at random meanwhile, and learns their scales. The input of a block is the output of the quantized blocks before
it; the target is the output of the float block at the same place. Only inputs are needed, no labels.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import AlgorithmError, CalibrationError, HalfevenWarning, named
from halfeven.evaluation import evaluating
from halfeven.graph.wrappers import unwrapped
from halfeven.layerwise.activations import (
    ActivationCache,
    activation_cache,
    block_in_float,
    check_float_weights,
)
from halfeven.layerwise.blocks import Block, Granularity, find_blocks
from halfeven.layerwise.cache import BoundedCache, store_inputs
from halfeven.layerwise.sqnr import decibels
from halfeven.placement.graph_edits import untie_layers
from halfeven.placement.make_plan import qualified, regions
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction.float_parameters import shared_parameters, with_values
from halfeven.ptq.reconstruction.optimize import BlockResult, optimize_block
from halfeven.ptq.reconstruction.resume import BlockStore
from halfeven.quantization.model_quantizers import quantizers
from halfeven.quantization.quantizer import Mode
from halfeven.renamed import renamed_parameters

Log = Callable[[str], None]


@dataclass(frozen=True)
class BlockReport:
    """SQNR of a block's outputs, in dB, before and after its reconstruction."""

    name: str
    layers: int
    """Number of quantized layers in it."""
    before: float
    """With weights rounded to nearest."""
    after: float
    """With what was learned."""
    undecided: float
    """Largest fraction of a weight's roundings that the regularizer had not driven to 0 or 1."""
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.name}: SQNR {self.before:.2f} -> {self.after:.2f} dB "
            f"({self.layers} layer{'s'[: self.layers > 1]}, {self.seconds:.1f} s)"
        )


@dataclass(frozen=True)
class ReconstructionReport:
    """The gain of a reconstruction, block by block."""

    blocks: tuple[BlockReport, ...]
    """One for each layer or block, in order."""
    iterations: int
    """Steps of each block."""
    bytes_on_disk: int = 0
    """Size of all stored activations that did not fit into the memory bound."""
    nearest: tuple[str, ...] = ()
    """Weights that keep rounding to nearest, because no convolution or linear module holds them."""

    def __str__(self) -> str:
        head = f"Reconstruction of {len(self.blocks)} blocks, {self.iterations} steps each:"
        disk = [f"  {self.bytes_on_disk / 1e9:.1f} GB of activations lay on the disk."] if self.bytes_on_disk else []
        nearest = [f"  {_nearest_sentence(self.nearest)}"] if self.nearest else []
        return "\n".join([head, *(f"  {block}" for block in self.blocks), *nearest, *disk])


def _nearest_sentence(names: Sequence[str]) -> str:
    return (
        f"{len(names)} weight{'s keep' if len(names) > 1 else ' keeps'} rounding to nearest, computed by the model or "
        f"read by a function rather than by a convolution or linear module: {named(names)}."
    )


@renamed_parameters(say="log", state="resume_dir")
@checked_arguments(AlgorithmError)
def adaround(
    qmodel: nn.Module,
    loader: Iterable[Any],
    *,
    options: PTQOptions | None = None,
    batches: int | None = None,
    resume_dir: Path | None = None,
    log: Log | None = None,
) -> ReconstructionReport:
    """Learn, layer by layer, whether each weight is rounded up or down (AdaRound), in place.

    Weight ranges must be set before (`halfeven.calibrate`) and are final afterwards: a new range would undo the
    rounding. Ranges of activations may be set again by `calibrate`.

    Args:
        qmodel: a calibrated model.
        loader: batches as for `calibrate`; 500 to 1,000 samples suffice (white paper, section 3.4).
        options: `iterations`, `batch_size`, `rounding_rate`, memory bound and seed; options of what AdaRound does not
            learn are ignored.
        batches: largest number of the loader's batches to read; None: all.
        resume_dir: folder for finished layers. A killed run that is started again goes on from it, and ends with the
            same weights as an uninterrupted run.
        log: called with a line about each layer when it is finished.

    Raises:
        AlgorithmError: the rounding was learned before.
        CalibrationError: the loader is empty, or a range is not set.
        CheckpointError: `resume_dir` belongs to another run.
    """
    options = dataclasses.replace(options or PTQOptions(), drop=0.0, scale_rate=0.0, bias_rate=0.0)
    return _reconstruct(qmodel, loader, "layers", options, batches, resume_dir, log)


@renamed_parameters(say="log", state="resume_dir")
@checked_arguments(AlgorithmError)
def reconstruct(
    qmodel: nn.Module,
    loader: Iterable[Any],
    *,
    options: PTQOptions | None = None,
    batches: int | None = None,
    resume_dir: Path | None = None,
    log: Log | None = None,
) -> ReconstructionReport:
    """Learn the rounding and the activation scales of each block together (BRECQ, QDrop), in place.

    Weight and activation ranges must be set before (`halfeven.calibrate`); afterwards they are final. Blocks are found
    in the graph (`halfeven.layerwise.blocks`). Biases are learned too with `options.bias_rate`, weight scales with
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
    """Reconstruct all layers or blocks of a model, in the order of its graph, in place."""
    qmodel = unwrapped(qmodel)
    # The number that "auto" stands for is written out, so that a resumed run compares numbers.
    options = dataclasses.replace(options, iterations=options.steps)
    # The target is the float model's output, so its weights must still be there, and no layer may share one with
    # another.
    check_float_weights(qmodel, "Reconstruction")
    untie_layers(qmodel)
    _check_calibrated(qmodel)
    cache = BoundedCache(options.memory * 1e9, options.cache_folder)
    reports: list[BlockReport] = []
    found = [(prefix, find_blocks(region, granularity)) for prefix, region in regions(qmodel).items()]
    count = sum(len(blocks) for _, blocks in found)
    with evaluating(qmodel), _parameters_without_gradients(qmodel), _progress_bar(count) as advance:
        inputs = store_inputs(qmodel, loader, options.batch_size, cache, batches)
        # Opened before the first block changes: the hash of the weights and ranges tells runs apart.
        finished = BlockStore.open(resume_dir, qmodel, inputs, options, granularity)
        # All that the float stream needs of the model is taken before the first weight changes: the arguments of its
        # regions, and the parameters of layers that it meets again.
        float_caches = [activation_cache(qmodel, prefix, inputs, cache, Mode.FLOAT) for prefix, _ in found]
        kept = shared_parameters(block for _, blocks in found for block in blocks)
        for prefix, blocks in found:
            floats = float_caches.pop(0)
            quantized = activation_cache(qmodel, prefix, inputs, cache, Mode.QUANTIZE)
            for report in _reconstruct_region(prefix, blocks, floats, quantized, kept, options, finished):
                reports.append(report)
                advance(report)
                if log is not None:
                    log(f"  {report}")
    nearest = tuple(q.name for q in quantizers(qmodel).values() if q.weight and not q.state.fixed)
    if nearest and log is not None:
        log(f"  {_nearest_sentence(nearest)}")
    elif nearest:
        warnings.warn(_nearest_sentence(nearest), HalfevenWarning, stacklevel=3)
    return ReconstructionReport(tuple(reports), options.steps, cache.on_disk, nearest)


def _reconstruct_region(
    prefix: str,
    blocks: list[Block],
    floats: ActivationCache,
    quantized: ActivationCache,
    kept: Mapping[Tensor, Tensor],
    options: PTQOptions,
    finished: BlockStore,
) -> Iterator[BlockReport]:
    """Reconstruct the blocks of a region in order, each on the outputs of the finished blocks before it.

    Args:
        prefix: path of the region.
        blocks: its blocks.
        floats, quantized: caches of both forms, before the first block.
        kept: float values of the parameters that an earlier call of their layer has changed.
        options: of each block.
        finished: blocks of an interrupted run.
    """
    # Two streams through the same blocks: each block is the float model's while `floats` advances, and is final when
    # `quantized` does.
    for index, block in enumerate(blocks):
        begin = time.perf_counter()
        name = qualified(prefix, block.name)
        # The target is the float model's output on float inputs, the input is the quantized model's: AdaRound's
        # asymmetric reconstruction, which lets a block make up for the errors before it.
        with block_in_float(block), with_values(kept):
            floats.advance(block)
        result = finished.restore(name, block)
        if result is None:
            result = BlockResult(0, 0, 0)
            # A region without a quantized weight is a single block without layers: its activations only pass on.
            if block.layers:
                # A seed for each block: a resumed run draws for its first block what an uninterrupted run draws there.
                result = optimize_block(block, floats, quantized, options, options.seed + index)
            finished.save(name, block, result)
        # A restored block is run as well, so that a resumed run gives the next block the same activations.
        quantized.advance(block)
        # Only what later blocks read stays, so that memory is bounded by one place of the graph.
        for cached in (floats, quantized):
            cached.release(blocks[: index + 1])
        yield BlockReport(
            name=name,
            layers=len(block.layers),
            before=decibels(result.before),
            after=decibels(result.after),
            undecided=result.undecided,
            seconds=time.perf_counter() - begin,
        )


def _check_calibrated(qmodel: nn.Module) -> None:
    unset = [name for name, q in quantizers(qmodel).items() if not q.state.has_range]
    if unset:
        raise CalibrationError(
            f"{len(unset)} quantizers ({unset[0]}, for example) have no range yet, so there is no grid to round to. "
            "Run halfeven.calibrate(qmodel, loader) before the reconstruction."
        )


@contextmanager
def _parameters_without_gradients(model: nn.Module) -> Iterator[None]:
    """Switch the gradients of all parameters off, except those that a block learns; restore the flags at the end."""
    # Backward would else compute gradients of all weights of a block, which the soft weights stand in for.
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(before.get(parameter, True))


@contextmanager
def _progress_bar(total: int) -> Iterator[Callable[[BlockReport], None]]:
    """Show a progress bar with the last block's SQNR; nothing is shown where the output is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:  # a disabled bar still writes an empty line, or an empty output of a notebook
        yield lambda report: None
        return
    columns = (
        TextColumn("reconstruction"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda report: progress.update(task, advance=1, description=str(report))
