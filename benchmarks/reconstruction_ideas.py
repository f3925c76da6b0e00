"""Ideas for the reconstruction of blocks on Fashion-MNIST, each alone on top of the defaults; none is in halfeven.

    python benchmarks/reconstruction_ideas.py MODEL WEIGHTS.safetensors [--ideas MRECG] [--steps 200] [--seeds 0 1 2]

MRECG (arXiv 2303.11906): neighbouring blocks are learned together where the errors of the blocks oscillate. FIMA-Q's
diagonal form (arXiv 2506.11543): each element of a block's error is weighed by the gradient of the answers' divergence.
PD-Quant's first part (arXiv 2212.07048): the divergence of the answers chooses the scales of activations. All three are
written for networks that end in logits and whose blocks pass on one tensor each.

Model, weights, images and seeds are those of ptq.py. Beside the accuracy, the KL divergence of the answers on the test
images from those of the float model: it tells smaller differences apart.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
from fashion_mnist import Images, arguments, float_model, images_of
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

import halfeven as he
from halfeven.graph.copying import copy_model
from halfeven.layerwise import blocks as block_finding
from halfeven.layerwise.activations import ActivationCache, Values, activation_cache, block_in_float, run
from halfeven.layerwise.blocks import Block, find_blocks
from halfeven.layerwise.cache import BoundedCache, store_inputs
from halfeven.ptq import pipeline
from halfeven.ptq.reconstruction import optimize, reconstruct
from halfeven.quantization.quantizer import Mode, Quantizer
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions

JOINED_PAIRS = 5
"""Pairs of neighbours that MRECG joins: as many as in the authors' file for MobileNetV2."""
MAX_JOINED = 3
"""Largest number of blocks that are joined: as in the same file."""
TEMPERATURE = 20.0
"""What FIMA-Q divides logits by."""
FACTORS = (1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2)
"""Candidates of PD-Quant's search, in units of the calibrated scale; the first wins a tie."""
SEARCH_BATCHES = 4
"""Batches of 64 samples that the search sees."""


def divergence(found: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """The KL divergence of the answers from those of the float model, a mean over the samples."""
    shares = (log_softmax(logits / temperature, dim=-1) for logits in (found, expected))
    return kl_div(*shares, reduction="batchmean", log_target=True)


def float_answers(blocks: Sequence[Block], values: Values) -> Tensor:
    """The logits that blocks in float make of the values before the first of them."""
    for block in blocks:
        with block_in_float(block):
            values = run(block, values)
    (logits,) = values.values()
    return logits


# MRECG


def oscillating_groups(errors: Sequence[float]) -> list[list[int]]:
    """Indices of the blocks to learn together: the pairs of neighbours whose errors differ most are joined."""
    differences = [abs(before - after) for before, after in pairwise(errors)]
    groups = [[index] for index in range(len(errors))]
    joined = 0
    for pair in sorted(range(len(differences)), key=lambda index: -differences[index]):
        left, right = (next(group for group in groups if index in group) for index in (pair, pair + 1))
        if joined < JOINED_PAIRS and len(left) + len(right) <= MAX_JOINED:
            left += right
            groups.remove(right)
            joined += 1
    return groups


class OscillatingBlocks:
    """Joins blocks by the errors of a first reconstruction; the groups are those of the first model."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, `halfeven.quantize` reconstructs the groups."""
        separately = pipeline.reconstruct

        def reconstruct_groups(qmodel: Any, batches: Any, **options: Any) -> Any:
            if not self.groups:
                report = separately(copy_model(qmodel), batches, **options)
                self.groups = oscillating_groups([10 ** (-block.after / 10) for block in report.blocks])
            with mock.patch.object(reconstruct, "find_blocks", self._joined):
                return separately(qmodel, batches, **options)

        with mock.patch.object(pipeline, "reconstruct", reconstruct_groups):
            yield

    def _joined(self, region: Any, granularity: Any) -> list[Block]:
        blocks = find_blocks(region, granularity)
        parts = [[node for index in group for node in blocks[index].nodes] for group in self.groups]
        return [block_finding._make_block(nodes) for nodes in parts]


# FIMA-Q


@contextmanager
def error_weighed_by_gradients(temperature: float = TEMPERATURE) -> Iterator[None]:
    """Inside, blocks minimize the error weighed by the diagonal of the Fisher information, 1 at the start."""
    minimize = optimize._minimize_error

    def minimize_weighed(block: Block, floats: Any, quantized: Any, *rest: Any) -> None:
        weights = _fisher_diagonal(block, floats, quantized, temperature)

        def weighed(found: Values, expected: Values, powers: object) -> Tensor:
            return torch.stack([(w * (found[n] - expected[n]).square()).mean() for n, w in weights.items()]).sum()

        with mock.patch.object(optimize, "_relative_error", weighed):
            minimize(block, floats, quantized, *rest)

    with mock.patch.object(optimize, "_minimize_error", minimize_weighed):
        yield


def _fisher_diagonal(
    block: Block, floats: ActivationCache, quantized: ActivationCache, temperature: float
) -> dict[Any, Tensor]:
    """Weights of the squared differences of a block's output, [1, ...]: the gradients' mean size over the samples."""
    (node,) = block.outputs
    blocks = find_blocks(floats.region, "blocks")
    later = blocks[1 + next(i for i, other in enumerate(blocks) if other.nodes[-1] is block.nodes[-1]) :]
    gradients, squares = [], []
    for batch in range(len(quantized.batches)):
        with torch.no_grad():
            expected = floats.outputs(block, batch)
            found = run(block, quantized.inputs(block, batch))[node]
            logits = float_answers(later, expected)
        squares.append((found - expected[node]).square().mean(0, keepdim=True))
        with torch.enable_grad():
            found = found.detach().requires_grad_()
            divergence(float_answers(later, {node: found}), logits, temperature).backward()
        assert found.grad is not None
        gradients.append(found.grad.abs().mean(0, keepdim=True))
    weights = torch.stack(gradients).mean(0)
    return {node: weights / (weights * torch.stack(squares).mean(0)).mean()}


# PD-Quant


@contextmanager
def scales_by_answers() -> Iterator[None]:
    """Inside, each calibration of `halfeven.quantize` is followed by a search of the scales of activations."""
    calibrate = pipeline.calibrate

    def calibrate_and_search(qmodel: Any, batches: Any) -> Any:
        calibrate(qmodel, batches)
        _search_scales(qmodel, batches)
        return qmodel

    with mock.patch.object(pipeline, "calibrate", calibrate_and_search):
        yield


@torch.no_grad()
def _search_scales(qmodel: Any, batches: Any) -> None:
    """Choose scale by scale, in the order of the network, with all before it quantized and later blocks in float."""
    store = BoundedCache(1e9)
    inputs = store_inputs(qmodel, batches, 64, store, SEARCH_BATCHES)
    quantized = activation_cache(qmodel, "", inputs, store, Mode.QUANTIZE)
    blocks = find_blocks(quantized.region, "blocks")
    places = range(len(inputs))
    expected = [float_answers(blocks, quantized.inputs(blocks[0], place)) for place in places]
    for index, block in enumerate(blocks):
        later = blocks[index + 1 :]

        def harm() -> float:
            found = (float_answers(later, run(block, quantized.inputs(block, place))) for place in places)  # noqa: B023
            return sum(float(divergence(*pair)) for pair in zip(found, expected, strict=True))

        for quantizer in optimize._activation_quantizers(block):
            _take_best(quantizer, harm)
        quantized.advance(block)
        quantized.release(blocks[: index + 1])


def _take_best(quantizer: Quantizer, harm: Callable[[], float]) -> None:
    low, high = quantizer.low.clone(), quantizer.high.clone()
    harms = []
    for factor in FACTORS:
        quantizer.set_range(low * factor, high * factor)
        harms.append(harm())
    best = FACTORS[harms.index(min(harms))]
    quantizer.set_range(low * best, high * best)


# The comparison

IDEAS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "defaults": nullcontext,
    "MRECG": OscillatingBlocks(),
    "FIMA-Q": error_weighed_by_gradients,
    "PD-Quant": scales_by_answers,
}
"""Contexts of `halfeven.quantize`."""


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The logits of a model, [images, classes]."""
    return torch.cat([model(part) for part in images.split(500)])


def figures(logits: Tensor, expected: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 in percent, and the divergence from the float model's logits."""
    top1 = 100 * float((logits.argmax(1) == labels).float().mean())
    return {"top1": round(top1, 2), "divergence": round(float(divergence(logits, expected)), 5)}


def fashion_mnist(root: str, seed: int, samples: int, tests: int) -> tuple[Tensor, Images]:
    """The calibration images that a seed draws, and the first test images with their labels."""
    datasets = load_datasets(DataOptions(source="fashion_mnist", root=root, calibration_seed=seed))
    return images_of(datasets.calibration, samples)[0], images_of(datasets.validation, tests)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--ideas", nargs="+", default=list(IDEAS), choices=list(IDEAS))
    parser.add_argument("--steps", type=int, default=200, help="of each block")
    parser.add_argument("--samples", type=int, default=512, help="images that calibrate and learn")
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    model = float_model(options.model, options.weights)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        images, (inputs, labels) = fashion_mnist(options.root, seed, options.samples, options.test_images)
        expected = logits_of(model, inputs)
        for idea in options.ideas:
            with IDEAS[idea]():
                qmodel = he.quantize(model, images.split(64), scheme=options.scheme, iterations=options.steps)
            rows.append({"seed": seed, "idea": idea, **figures(logits_of(qmodel, inputs), expected, labels)})
            print(rows[-1], flush=True)
            if options.json:
                options.json.write_text(json.dumps({"model": options.model, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
