"""Cut batches for blocks with large feature maps: few of their samples give a good gradient.

Every position of a feature map is an equation for the weights: the stem of a network for images of 224 pixels sees
12,544 of them in one sample, its last layer 49. Steps of equally many samples would spend nearly all time on the first
blocks.
"""

import math

import torch
from torch import Tensor

from halfeven.graph.model_inputs import constant_size
from halfeven.graph.operators import OperatorKind
from halfeven.graph.view import Op
from halfeven.layerwise.activations import Values
from halfeven.layerwise.blocks import Block

POSITIONS_OF_A_STEP = 2**14
"""Positions after which further samples are left out of a step: 20 samples of 28 by 28, 5 of 56 by 56. The stem of
EfficientNet-Lite0 (112 by 112) ends at 18.15 dB with 2 samples a step and at 18.13 dB with 32, in a thirtieth of the
time; a block at 56 by 56 ends at 10.93 dB with 5 samples and with 10."""
MIN_SAMPLES = 2


def samples_of_a_step(block: Block) -> int:
    """Return the largest number of samples that a step of a block needs."""
    # The layer of the block with the most positions decides.
    return max(MIN_SAMPLES, POSITIONS_OF_A_STEP // max(map(_weight_positions, map(Op, block.layers)), default=1))


def _weight_positions(layer: Op) -> int:
    """Return the number of places of a sample at which a layer's weight is applied."""
    sizes = list(layer.shape)
    del sizes[-1 if layer.kind is OperatorKind.LINEAR else 1]
    return math.prod(constant_size(size) or 1 for size in sizes[1:])


def cut_samples(parts: tuple[Values, ...], samples: int, generator: torch.Generator) -> tuple[Values, ...]:
    """Return consecutive samples, from a random place, of the values of a batch.

    Nothing is cut where the values differ in their first size, which is then not the number of samples.

    Args:
        parts: a block's inputs and outputs.
        samples: number of samples to keep.
        generator: draws the place; nothing is drawn where all samples are kept.
    """
    values = [value for part in parts for value in part.values()]
    sizes = {len(value) if isinstance(value, Tensor) and value.ndim else 0 for value in values}
    count = min(sizes, default=0)
    if len(sizes) != 1 or count <= samples:
        return parts
    start = int(torch.randint(count - samples + 1, (), generator=generator))
    return tuple({node: value[start : start + samples] for node, value in part.items()} for part in parts)
