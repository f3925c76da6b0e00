"""Empirical bias correction: the shift of each output channel's mean by quantization is subtracted from the bias.

White paper, section 3.3 (arXiv:2106.08295): E[W x] - E[W^ x^] of each output channel is measured layer by layer, with
the quantized and already corrected layers before. It costs nothing at run time. The correction without data is in
`halfeven.ptq.data_free.calibrate`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from halfeven.checked_arguments import checked_arguments
from halfeven.errors import AlgorithmError
from halfeven.evaluation import evaluating
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import Op
from halfeven.graph.wrappers import unwrapped
from halfeven.layerwise.activations import (
    ActivationCache,
    activation_cache,
    block_in_float,
    check_float_weights,
    run_module,
)
from halfeven.layerwise.blocks import Block, find_blocks
from halfeven.layerwise.cache import BoundedCache, store_inputs
from halfeven.placement.graph_edits import give_bias, untie_layers
from halfeven.placement.make_plan import qualified, regions
from halfeven.ptq.options import PTQOptions
from halfeven.quantization.quantizer import Mode


def channel_means(x: Tensor, axis: int) -> Tensor:
    """Return the mean over all axes except one, [channels], in float64: long sums differ by little."""
    return x.detach().movedim(axis, 0).flatten(1).double().mean(1)


@dataclass(frozen=True)
class BiasCorrectionReport:
    """Result of `correct_biases`."""

    shifts: dict[str, float]
    """Layer -> root mean square of its channels' shifts, relative to the root mean square of its float outputs."""

    def __str__(self) -> str:
        if not self.shifts:
            return "Bias correction: no layer to correct."
        name = max(self.shifts, key=lambda key: self.shifts[key])
        return (
            f"Bias correction of {len(self.shifts)} layers; the largest shift, in {name}, is "
            f"{100 * self.shifts[name]:.1f} % of its outputs' root mean square."
        )


@checked_arguments(AlgorithmError)
@torch.no_grad()
def correct_biases(
    qmodel: nn.Module,
    loader: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    options: PTQOptions | None = None,
    batches: int | None = None,
) -> BiasCorrectionReport:
    """Correct the bias of every layer with a quantized weight, in place.

    Layers without a bias get one, which is recorded in the plan. A layer that is called several times has one bias, and
    gets one shift: the mean over its calls. All ranges must be set before; those of activations should be set again
    afterwards.

    Args:
        qmodel: a calibrated model.
        loader: batches as for `calibrate`; 500 to 1,000 samples suffice.
        reference: a copy of `qmodel` with the float weights, for a model whose rounding was learned and which has
            rounded weights only; None: `qmodel` itself.
        options: batch size and memory bound.
        batches: largest number of the loader's batches to read; None: all.

    Raises:
        AlgorithmError: the rounding was learned, and no `reference` is given.
        CalibrationError: the loader is empty, or a range is not set.
    """
    untie_layers(qmodel, ("bias",))
    options = options or PTQOptions()
    qmodel = unwrapped(qmodel)
    if reference is None:
        check_float_weights(qmodel, "Bias correction")
    cache = BoundedCache(options.memory * 1e9, options.cache_folder)
    inputs = store_inputs(qmodel, loader, options.batch_size, cache, batches)
    shifts: dict[str, float] = {}
    float_model = qmodel if reference is None else reference
    with evaluating(qmodel), evaluating(float_model):
        # The float arguments of all regions first: where `reference` is None, a corrected bias would change them.
        float_caches = {
            prefix: activation_cache(float_model, prefix, inputs, cache, Mode.FLOAT) for prefix in regions(qmodel)
        }
        for prefix in list(float_caches):
            quantized = activation_cache(qmodel, prefix, inputs, cache, Mode.QUANTIZE)
            float_blocks = find_blocks(regions(float_model)[prefix], "layers")
            means = _float_means(float_blocks, float_caches.pop(prefix))
            shifts |= _correct_region(qmodel, prefix, means, quantized)
    return BiasCorrectionReport(shifts)


def _correct_region(
    qmodel: nn.Module, prefix: str, float_means: Iterator["_OutputMeans | None"], quantized: ActivationCache
) -> dict[str, float]:
    """Correct the layers of a region in order, and return the shift of each relative to its outputs."""
    # Two streams of activations through the same blocks: the float one for E[W x], the quantized one for E[W^ x^]. The
    # latter runs through blocks that are corrected already, so each layer makes up only for what is left.
    blocks = find_blocks(quantized.region, "layers")
    last_calls = {layer: index for index, block in enumerate(blocks) if (layer := _layer_of(block)) is not None}
    expected: list[_OutputMeans | None] = []
    shifts: dict[str, float] = {}
    for index, block in enumerate(blocks):
        layer = _layer_of(block)
        last = index if layer is None else last_calls[layer]
        # The float stream goes first, and through all calls of the layer: where there is no reference, both streams
        # share the layer, whose bias is corrected next.
        expected += islice(float_means, max(0, last + 1 - len(expected)))
        name = qualified(prefix, block.name)
        wanted = expected[last]
        if wanted is not None and name not in shifts:
            shifts[name] = _correct_layer(qmodel, prefix, blocks[index : last + 1], wanted, quantized)
        # Run once more, now that the bias is corrected: the next layer reads these outputs.
        quantized.advance(block)
        quantized.release(blocks[: index + 1])
    return shifts


def _layer_of(block: Block) -> Any:
    """Return the layer of a block; None where it has none."""
    return Op(block.layers[0]).module if block.layers else None


def _float_means(blocks: Sequence[Block], floats: ActivationCache) -> Iterator["_OutputMeans | None"]:
    """Run blocks in float, one at a time, and yield the means of its layer over all calls so far; None without one."""
    means: dict[Any, _OutputMeans] = {}
    for index, block in enumerate(blocks):
        layer = _layer_of(block)
        if layer is not None and layer not in means:
            means[layer] = _OutputMeans(block)
        with block_in_float(block):
            floats.advance(block, run_module if layer is None else means[layer])
        floats.release(blocks[: index + 1])
        yield means.get(layer)


def _correct_layer(
    qmodel: nn.Module, prefix: str, blocks: Sequence[Block], expected: "_OutputMeans", quantized: ActivationCache
) -> float:
    """Correct the layer of a block, and return the shift relative to the outputs.

    Args:
        qmodel: the model.
        prefix: path of the region.
        blocks: the block of the layer's first call, to that of its last.
        expected: means of the float layer, over all calls.
        quantized: cache before the first of the blocks; it runs ahead to the last, and has to run through them again.
    """
    found = _OutputMeans(blocks[0])
    for block in blocks[:-1]:
        quantized.advance(block, found)
    quantized.visit(blocks[-1], found)
    # White paper, section 3.3: the expected change of each output channel, which the bias takes back.
    shift = expected.mean - found.mean  # E[W x] - E[W^ x^]
    (node,) = blocks[0].layers
    layer = Op(node)
    bias = give_bias(qmodel, qualified(prefix, layer.path))
    bias.add_(shift.to(bias))
    return float(shift.square().mean().sqrt() / expected.root_mean_square.clamp(min=1e-12))


class _OutputMeans:
    """Runs modules, and collects the mean of the outputs of a block's layer over all its calls, channel by channel."""

    def __init__(self, block: Block) -> None:
        (node,) = block.layers
        layer = Op(node)
        self.layer = layer.module
        self.axis = -1 if layer.kind is OperatorKind.LINEAR else 1
        self.total: Tensor | float = 0.0
        self.squares: Tensor | float = 0.0
        self.samples = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        result = module(*args)
        if module is self.layer:
            # Batches may differ in size, so each mean counts with its number of samples. Calls count alike: a level of
            # few positions is no less to a detector than a large level.
            self.total = self.total + channel_means(result, self.axis) * result.shape[0]
            self.squares = self.squares + result.double().square().mean() * result.shape[0]
            self.samples += result.shape[0]
        return result

    @property
    def mean(self) -> Tensor:
        """Mean of each output channel, [channels]."""
        assert isinstance(self.total, Tensor)
        return self.total / self.samples

    @property
    def root_mean_square(self) -> Tensor:
        """Root mean square of all output values, []."""
        assert isinstance(self.squares, Tensor)
        return (self.squares / self.samples).sqrt()
