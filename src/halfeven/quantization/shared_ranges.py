"""Observed ranges of a run of several processes: one exchange for all quantizers that a call of a model has moved."""

import torch
from torch import nn

from halfeven.distributed import is_distributed
from halfeven.quantization.observers import largest_of_processes
from halfeven.quantization.quantizer import Quantizer


@torch.no_grad()
def share_ranges(model: nn.Module) -> None:
    """Give all processes the same ranges of activations, after a call of a model in training.

    Each process quantizes its batch with ranges that its own batch has moved, as BatchNorm normalizes each batch by
    itself. An exchange for each quantizer would let the processes wait for each other at each layer.

    Raises:
        CalibrationError: a process met NaN or infinity. All processes raise: otherwise one would wait for ever.
    """
    if not is_distributed():
        return
    moved = [m for m in model.modules() if isinstance(m, Quantizer) and m.follows_batches and m.state.has_range]
    if not moved:
        return
    # All processes moved their ranges from the same ends, so the largest of these ends are what the largest of all
    # batches would have moved them to.
    ends = [
        torch.cat([end.reshape(-1) for end in side]) for side in zip(*((q.low, q.high) for q in moved), strict=True)
    ]
    sizes = [quantizer.low.numel() for quantizer in moved]
    lows, highs = (torch.split(end, sizes) for end in largest_of_processes(*ends))
    for quantizer, low, high in zip(moved, lows, highs, strict=True):
        quantizer.move_to(low.view_as(quantizer.low), high.view_as(quantizer.high))
