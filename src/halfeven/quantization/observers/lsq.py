"""The observer of LSQ's own start: a scale in proportion to the mean absolute value."""

import torch
import torch.distributed as dist
from torch import Tensor

from halfeven.quantization.observers.minmax import MinMaxObserver, all_reduce, rows
from halfeven.quantization.scheme import Scheme


class LSQObserver:
    """Proposes the range of the scale 2 * mean|x| / sqrt(quant_max) (LSQ, Esser et al. 2020, section 2.1).

    The paper takes the mean over the first batch of an activation; here it is that over all batches. The paper has no
    zero points: on an asymmetric grid, zero lies where min-max puts it.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme
        self.extremes = MinMaxObserver(scheme)
        self.total = torch.empty(0)
        self.count = 0

    def update(self, values: Tensor) -> None:
        """See a batch, [channels or 1, ...]."""
        self.extremes.update(values)
        found = rows(values).abs()
        # In double precision: a sum in float32 stops growing after 2^24 values of one size.
        total = found.sum(-1, dtype=torch.float64) if found.device.type != "mps" else found.sum(-1)
        self.total = self.total + total if self.count else total
        self.count += found.shape[-1]

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the proposed range, (low, high), each [channels or 1]."""
        low, high = self.extremes.range()
        total = all_reduce(self.total, dist.ReduceOp.SUM)
        count = all_reduce(torch.full_like(total, self.count), dist.ReduceOp.SUM)
        scheme = self.scheme
        scale = (2 * total / count / scheme.quant_max**0.5).float()
        if scheme.symmetric:
            return (-scale if scheme.signed else 0 * scale) * scheme.quant_max, scale * scheme.quant_max
        low = low.clamp(max=0.0)
        extent = (high.clamp(min=0.0) - low).clamp(min=torch.finfo(torch.float32).tiny)
        # All steps of the grid at LSQ's scale, divided at zero in the proportion of the extremes.
        width = scale * (scheme.quant_max - scheme.quant_min)
        return width * (low / extent), width * (1 + low / extent)
