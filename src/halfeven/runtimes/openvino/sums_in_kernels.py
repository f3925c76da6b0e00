"""Residual sums stay in the kernel of the convolution before them.

The plugin (2026.4) groups elementwise operators into kernels of its own before it fuses any into a convolution. It
leaves out a sum that it is going to fuse, and knows it by the operator before: a convolution, its bias, or a quantizer
behind either. Between a convolution of integers and its bias stands the product with its scales, so that it knows none
of ours. Where sizes are fixed (`model.reshape`, a server that fixes the batch) such a sum becomes a kernel of its own,
and the convolution before it writes float32 for it.

A quantizer of very many levels marks the sum. In the convolution's kernel the plugin makes it a clip that does not
round, with limits beyond all that can matter.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from halfeven.deployment.grids import grid_of, quantizer_at
from halfeven.deployment.quantize_op import ExportedQuantizer
from halfeven.graph.operators import OperatorKind
from halfeven.graph.rebuild import CapturedModule
from halfeven.graph.view import Op, kind_of
from halfeven.runtimes.float32 import fused_multiply_add
from halfeven.runtimes.openvino.exact_values import Accumulator, Codes, FakeQuantizeRange, ScaledSum
from halfeven.runtimes.openvino.residual_add import read_before
from halfeven.runtimes.simulation import Simulated

MARK_LEVELS = 2**23 + 1
"""Where the plugin does not fuse the quantizer it rounds, to steps as fine as those of float32. With limits that are
powers of 2 its step is one too, so that most of the plugin's constants are exact."""


def mark_sums(region: CapturedModule) -> None:
    """Mark the residual sums of a region that a convolution's kernel can compute, in place."""
    for node in list(region.graph.nodes):
        if node.target is not torch.ops.aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
            continue
        behind = _quantizer_behind(node)
        for branch, skip in (node.args, node.args[::-1]):
            before = grid_of(skip)
            if behind is None or before is None or before.signed or kind_of(branch) is not OperatorKind.CONVOLUTION:
                continue
            if len(branch.users) == 1 and read_before(skip, branch, node) and Op(branch).shape == Op(skip).shape:
                with region.graph.inserting_before(node):
                    limit = _limit_of_sum(behind, before)
                    marked = region.graph.call_function(torch.ops.halfeven.branch_of_sum.default, (branch, limit))
                marked.meta = dict(branch.meta)
                node.replace_input_with(branch, marked)
                break


def _quantizer_behind(node: fx.Node) -> ExportedQuantizer | None:
    """Return the quantizer that alone reads a sum, directly or behind clips."""
    while len(node.users) == 1:
        (node,) = node.users
        if (quantizer := quantizer_at(node)) is not None:
            return quantizer
        if Op(node).bounds is None:
            return None
    return None


def _limit_of_sum(*quantizers: ExportedQuantizer) -> float:
    """Return a power of 2 that is twice as large as all that quantizers yield together.

    A branch beyond what the quantizers behind the sum and on the skip connection yield together is clipped behind the
    sum, whatever is added to it.
    """
    ranges = [FakeQuantizeRange.of(quantizer, signed_readers=False) for quantizer in quantizers]
    largest = sum(float(torch.maximum(limits.low.abs(), limits.high.abs()).max()) for limits in ranges)
    return 2.0 ** math.ceil(math.log2(2 * largest))


@dataclass(frozen=True, eq=False)
class Branch(Simulated):
    """The result of a convolution in whose kernel a skip connection is added to it."""

    values: Tensor | Accumulator
    limit: float

    def real(self) -> Tensor:
        return self.values if isinstance(self.values, Tensor) else self.values.real()

    def plus(self, skip: Codes) -> ScaledSum:
        """Return the sum in units of the skip connection's scale, as an operator of its own and in the kernel.

        The plugin moves both into the limits that the quantizer of the mark returns; where it does not round, a single
        product and sum is left of it.
        """
        unit = skip.limits.scale
        inverse = torch.ones_like(unit) / unit
        zero = skip.limits.zero_byte * unit
        values = self.values.values if isinstance(self.values, Accumulator) else self.values
        own = self.values.unit if isinstance(self.values, Accumulator) else torch.ones_like(unit)
        # The limits of the mark before it, in units of the convolution's sums: value * to_steps + first is a place in
        # steps.
        steps = torch.tensor(float(MARK_LEVELS - 1))
        high = torch.full_like(own, self.limit) / own
        low = -high
        to_steps = steps / (high - low)
        first = -low * steps / (high - low)
        # The limits behind it, less the skip connection's zero point and in units of its scale: place * step + low_out.
        low_out = (torch.full_like(unit, -self.limit) - zero) * inverse
        high_out = (torch.full_like(unit, self.limit) - zero) * inverse
        step = (high_out - low_out) / steps
        # As an operator of its own the mark rounds, to steps as fine as those of float32.
        rounded = torch.round(_place_in_steps(values, to_steps, first))
        # In the convolution's kernel it does not round: both linear functions become one.
        factor = to_steps * step
        shift = first * step + low_out
        in_kernel = fused_multiply_add(values, factor, shift) + skip.bytes
        total = fused_multiply_add(rounded, step, low_out) + skip.bytes
        return ScaledSum(total, unit, from_layer=True, in_kernel=in_kernel)


def _place_in_steps(values: Tensor, to_steps: Tensor, first: Tensor) -> Tensor:
    """Return the place of values on the grid of a quantizer that is an operator of its own.

    Where each channel has a range of its own, the plugin rounds the product before it adds, as
    `FakeQuantizeRange.codes_by_channel` does.
    """
    factors = to_steps.flatten()
    if bool((factors == factors[0]).all()):
        return fused_multiply_add(values, to_steps, first)
    return values * to_steps + first
