"""The observer of logits: it keeps the distribution over the classes that they stand for."""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from halfeven.errors import ConfigError
from halfeven.quantization.arithmetic import dequantize, quantize, scale_and_zero_point
from halfeven.quantization.observers.minmax import all_reduce, finite_extremes, seen
from halfeven.quantization.observers.search import by_parts, least_error
from halfeven.quantization.scheme import Scheme

MAX_LOGITS = 2**18
"""Largest number of logits to keep, in whole samples: those of 262 samples with a thousand classes."""

MAX_SEARCH_NUMBERS = 2**21
"""Largest number of logits, over all candidate ranges, that the search quantizes at a time."""


def cross_entropies(logits: Tensor, low: Tensor, high: Tensor, scheme: Scheme) -> Tensor:
    """Return the cross-entropy between softmaxes of logits and of quantized logits (white paper, section 3.1).

    Args:
        logits: [samples, classes].
        low, high: ends of the candidate ranges, [candidates].
        scheme: the grid.

    Returns:
        -sum(softmax(v) * log softmax(v')) in nats, over classes and samples, [candidates].
    """
    # The candidates take the place of channels: a single call quantizes with all of them.
    by_candidate = dataclasses.replace(scheme, axis=0)
    scale, zero_point = scale_and_zero_point(low, high, by_candidate)
    copies = logits.expand(len(low), -1, -1)  # [candidates, samples, classes]
    quantized = dequantize(quantize(copies, scale, zero_point, by_candidate), scale, zero_point, by_candidate)
    # -sum(p log softmax(v')) = sum(logsumexp(v') - sum(p v')): the probabilities of a sample add up to 1.
    expected = torch.einsum("csk,sk->cs", quantized, torch.softmax(logits, -1))
    return (torch.logsumexp(quantized, -1) - expected).double().sum(-1)


class CrossEntropyObserver:
    """Proposes the range that changes the probabilities of the classes least.

    The classes lie on the last axis that is longer than 1. The largest logits decide on the probabilities, and squared
    error would weigh them like the many small ones (white paper, section 3.1). The observer keeps a random, seeded
    choice of the samples, which does not depend on how they are batched.

    Raises:
        ConfigError: the scheme has one scale per channel.
    """

    def __init__(self, scheme: Scheme) -> None:
        if scheme.axis is not None:
            raise ConfigError(
                "The observer cross_entropy cannot set one scale per channel: probabilities of classes depend on all "
                'logits of a sample together, so they give one range. Choose another observer, such as "mse".'
            )
        self.scheme = scheme
        self.generator = torch.Generator().manual_seed(0)
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        self.logits = torch.empty(0, 0)
        self.tickets = torch.empty(0)

    def update(self, values: Tensor) -> None:
        """See a batch, [1, samples, ..., classes] or the output of a pool, [1, samples, classes, 1, 1]."""
        low, high = finite_extremes(values)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        while values.ndim > 2 and values.shape[-1] == 1:  # the output of a pool
            values = values.squeeze(-1)
        new = values.detach().float().flatten(0, -2)  # [samples, classes]
        # Each sample draws a ticket, and those with the smallest stay: every subset of the samples is equally likely.
        tickets = torch.rand(len(new), generator=self.generator, dtype=torch.float64)
        self.tickets = torch.cat([self.tickets, tickets])
        self.logits = torch.cat([self.logits.to(new).reshape(-1, new.shape[-1]), new])
        kept = self.tickets.argsort()[: max(1, MAX_LOGITS // new.shape[-1])].sort().values
        self.tickets = self.tickets[kept]
        self.logits = self.logits[kept.to(new.device)]

    def range(self) -> tuple[Tensor, Tensor]:
        """Return the range with the least cross-entropy, [1] each, over the samples of all processes."""
        low = seen(self.low)
        high = seen(self.high)
        size = max(1, MAX_SEARCH_NUMBERS // self.logits.numel())
        mine = by_parts(lambda a, b: cross_entropies(self.logits, a[:, 0], b[:, 0], self.scheme)[:, None], size)
        # Each process has its own samples, and the sum over the processes decides: all choose the same range.
        return least_error(lambda a, b: all_reduce(mine(a, b), dist.ReduceOp.SUM), low, high, self.scheme.symmetric)
