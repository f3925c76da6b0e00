"""The range of logits: what counts is the distribution over the classes that they stand for."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from halfeven.errors import ConfigError
from halfeven.quantization.arithmetic import dequantize, quantize, scale_and_zero_point
from halfeven.quantization.observers.minmax import all_reduce, finite_extremes, seen
from halfeven.quantization.observers.search import by_parts, least_error
from halfeven.quantization.scheme import Scheme

KEPT = 2**18
"""Logits that are kept, in whole samples: 262 samples of a thousand classes, or all of a smaller problem."""

AT_ONCE = 2**21
"""Numbers that the search holds at a time."""


def cross_entropies(logits: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> Tensor:
    """Cross-entropy between the classes of logits and of quantized logits, a sum over samples (white paper, 3.1).

    Args:
        logits: [samples, classes].
        low, high: ends of the ranges to try, [candidates].
        scheme: the grid.

    Returns:
        -sum(softmax(v) * log softmax(v')), shape [candidates].
    """
    by_candidate = dataclasses.replace(scheme, axis=0)
    scale, zero_point = scale_and_zero_point(low, high, by_candidate)
    copies = logits.expand(len(low), -1, -1)
    quantized = dequantize(quantize(copies, scale, zero_point, by_candidate), scale, zero_point, by_candidate)
    # -sum(p log softmax(v')) = sum(logsumexp(v') - sum(p v')): the probabilities of a sample add up to 1.
    expected = torch.einsum("csk,sk->cs", quantized, torch.softmax(logits, -1))
    return (torch.logsumexp(quantized, -1) - expected).double().sum(-1)


class CrossEntropyObserver:
    """The range that least changes the probabilities of the classes, which lie on the last axis that is longer than 1.

    Large logits decide, and squared error would treat them like the many small ones (white paper, section 3.1). A
    random, seeded choice of the samples is kept; it is the same however they come in batches.
    """

    def __init__(self, scheme: Scheme) -> None:
        if scheme.axis is not None:
            raise ConfigError(
                "The observer cross_entropy was asked for one scale per channel. The probabilities of classes depend "
                "on all logits of a sample together, so they give one range: choose another observer, such as mse."
            )
        self.scheme = scheme
        self.generator = torch.Generator().manual_seed(0)
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.logits = torch.empty(0, 0)
        self.tickets = torch.empty(0)

    def update(self, values: Tensor) -> None:
        low, high = finite_extremes(values)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        while values.ndim > 2 and values.shape[-1] == 1:  # of a pool
            values = values.squeeze(-1)
        new = values.detach().float().flatten(0, -2)
        # Every sample draws a ticket, and those with the smallest stay: each subset of all samples is as likely.
        tickets = torch.rand(len(new), generator=self.generator, dtype=torch.float64)
        self.tickets = torch.cat([self.tickets, tickets])
        self.logits = torch.cat([self.logits.to(new).reshape(-1, new.shape[-1]), new])
        kept = self.tickets.argsort()[: max(1, KEPT // new.shape[-1])].sort().values
        self.tickets, self.logits = self.tickets[kept], self.logits[kept.to(new.device)]

    def range(self) -> tuple[Tensor, Tensor]:
        low, high = seen(self.low), seen(self.high)
        size = max(1, AT_ONCE // self.logits.numel())
        mine = by_parts(lambda a, b: cross_entropies(self.logits, a[:, 0], b[:, 0], self.scheme)[:, None], size)
        # Each process has samples of its own, and the sum over all of them decides: all choose the same range.
        return least_error(lambda a, b: all_reduce(mine(a, b), dist.ReduceOp.SUM), low, high, self.scheme.symmetric)
