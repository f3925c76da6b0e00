"""Oscillations of weights between two integers: detected, logged, dampened and frozen.

Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (arXiv 2203.11086): under straight-through
gradients a weight whose optimum is between two integers hops from one to the other until the end of the training. That
spoils BatchNorm's statistics and holds other weights back, most of all in depthwise convolutions at 4 bits and fewer.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from halfeven.errors import CheckpointError, ConfigError
from halfeven.options import NonNegativeFloat, Options, above, at_least, at_most, below
from halfeven.placement.quantized_layers import output_channels
from halfeven.quantization.arithmetic import per_channel, quantize
from halfeven.quantization.compile import fused
from halfeven.quantization.quantizer import Quantizer
from halfeven.quantization.scheme import Bits

OSCILLATING_FREQUENCY = 0.005
"""Frequency, in turns per step, above which a weight counts as oscillating: one in 200 steps (section 2.3)."""


@dataclass(frozen=True, kw_only=True)
class OscillationOptions(Options):
    """The search for oscillations and the measures against them.

    Raises:
        ConfigError: numbers that would freeze everything, or nothing.
    """

    track: bool = False
    """Follow and log oscillations even where nothing is done about them, at the cost of a pass over the weights in
    each step."""
    freeze: bool = False
    """Freeze weights that oscillate too often (Nagel et al., arXiv:2203.11086, section 4.3)."""
    dampening: NonNegativeFloat = 0.0
    """Weight of the dampening term at the end of the run (the same, section 4.2); 0: none."""
    bits: Bits = 4
    """Weights with more bits are not followed: their steps are too small to matter."""
    momentum: Annotated[float, above(0), below(1)] = 0.01
    """Weight of a step in the moving averages of frequencies and of integers."""
    freeze_from: Annotated[float, above(0), at_most(1)] = 0.1
    """Frequency, in turns per step, above which a weight is frozen at first."""
    freeze_to: Annotated[float, above(0), at_most(1)] = 0.03
    """Frequency above which a weight is frozen at the end of the run; the limit falls to it as a cosine."""
    start: Annotated[float, at_least(0), below(1)] = 0.25
    """Share of the run after which freezing and dampening set in."""

    def __post_init__(self) -> None:
        if self.freeze_to > self.freeze_from:
            raise ConfigError(
                f"oscillation.freeze_to={self.freeze_to} is above freeze_from={self.freeze_from}: fewer weights would "
                "be frozen at the end than at first. Set freeze_to to at most freeze_from."
            )
        if self.freeze and self.freeze_to < 2 * self.momentum:
            raise ConfigError(
                f"oscillation.freeze_to={self.freeze_to} is below twice the momentum {self.momentum}: one single turn "
                "raises a frequency by the momentum, so that nearly every weight would be frozen. Raise freeze_to, or "
                "lower the momentum."
            )


def _follow_integers(
    weight: Tensor,
    scale: Tensor,
    bounds: tuple[int, int],
    before: Tensor,
    direction: Tensor,
    frequency: Tensor,
    average: Tensor,
    frozen: Tensor,
    momentum: float,
) -> None:
    """Follow the integers of a weight over a step, in place. The integers of frozen elements do not move.

    Args:
        weight: latent weights, [channels, elements].
        scale: [channels or 1, 1].
        bounds: ends of the grid.
        before, direction: integers after the last step, and the sign of their last change, like `weight`.
        frequency, average: moving averages of turns per step and of the integers, like `weight`.
        frozen: True for elements that are held on their integers, like `weight`.
        momentum: weight of this step in the moving averages.
    """
    # Section 2.3: a weight oscillates in a step where its integer changes, in the direction opposite to its last
    # change. The frequency is a moving average of these events; section 4.3 averages the integers too.
    # A frozen element stays on `average`, which was rounded to an integer when it was frozen.
    integers = torch.where(frozen, average, _weight_integers(weight, scale, bounds))
    change = torch.sign(integers - before)
    # -1 where this change and the last one go in opposite directions, 0 where nothing changed.
    turned = (change * direction < 0).float()
    frequency.copy_(torch.lerp(frequency, turned, momentum))
    average.copy_(torch.lerp(average, integers, momentum))
    # Steps without a change keep the direction: a turn is counted however long the weight rests between.
    direction.copy_(torch.where(change != 0, change, direction))
    before.copy_(integers)


def _weight_integers(weight: Tensor, scale: Tensor, bounds: tuple[int, int]) -> Tensor:
    return torch.clamp(torch.round(weight / scale), *bounds)


class _Weight:
    """The weight of a layer with its oscillation state; tensors are [channels, elements] or [1, elements]."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.quantizer: Quantizer = layer.weight_quantizer
        # Grids of weights are symmetric, so that an integer is round(w / s) without a zero point.
        start = _weight_integers(*self._weight_on_grid())
        self.before = start.to(torch.int8)
        self.direction = torch.zeros_like(start, dtype=torch.int8)
        self.frequency = torch.zeros_like(start)
        self.average = start.clone()
        self.frozen = torch.zeros_like(start, dtype=torch.bool)

    def _as_rows(self, x: Tensor) -> Tensor:
        axis = self.quantizer.scheme.axis
        return x.reshape(1, -1) if axis is None else x.movedim(axis, 0).flatten(1)

    def _weight_on_grid(self) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Return the weight, [channels, elements], its scale, [channels or 1, 1], and the ends of its grid."""
        weight = self.layer.weight.detach()
        scheme = self.quantizer.scheme
        scale = self.quantizer.used_scale(weight).reshape(-1, 1)
        return self._as_rows(weight), scale, (scheme.quant_min, scheme.quant_max)

    def step(self, momentum: float, threshold: float | None) -> None:
        """Follow the weight over a step, and freeze the elements whose frequency is above the threshold."""
        self._follow_device()
        state = (self.before, self.direction, self.frequency, self.average, self.frozen)
        fused(_follow_integers)(*self._weight_on_grid(), *state, momentum)
        # Frozen after they are followed: an element that has just gone over the threshold is held from this step on.
        if threshold is not None:
            chosen = (self.frequency > threshold) & ~self.frozen
            # Section 4.3: a frozen element stays on the integer nearest to its moving average.
            self.average = torch.where(chosen, torch.round(self.average), self.average)
            # The jump to the frozen integer is ours: it must not count as a change in the next step.
            self.before = torch.where(chosen, self.average, self.before).to(torch.int8)
            self.frozen |= chosen
            self._restore_frozen()

    def _follow_device(self) -> None:
        device = self.layer.weight.device
        if self.before.device != device:
            for key in STATE_TENSORS:
                setattr(self, key, getattr(self, key).to(device))

    def _restore_frozen(self) -> None:
        """Put frozen elements back on their integers, which the optimizer or a new scale has moved them from."""
        axis = self.quantizer.scheme.axis
        weight = self.layer.weight
        rows, scale, _ = self._weight_on_grid()
        # The rows are those of `_as_rows`: the channels first, which `movedim` puts back in their place below.
        shape = weight.shape if axis is None else weight.movedim(axis, 0).shape
        held = torch.where(self.frozen, self.average * scale, rows).reshape(shape)
        # Section 4.3 freezes the integer and not the weight: with a scale that still learns, the latent weight moves
        # with it.
        weight.data.copy_(held if axis is None else held.movedim(0, axis))

    def distance(self) -> Tensor:
        """Return the sum of squared distances of weights to their integers, the mean over output channels, []."""
        # Section 4.2: |fake_quantize(w) - clip(w, s * low, s * high)|^2, without a gradient to s.
        weight = self.layer.weight
        scheme = self.quantizer.scheme
        scale = self.quantizer.used_scale(weight.detach()).detach()
        column = per_channel(scale, scheme.axis, weight.ndim)
        # The clip takes weights beyond the grid out of the loss: their gradient is 0, and the straight-through
        # estimator has none for them either.
        inside = torch.minimum(torch.maximum(weight, scheme.quant_min * column), scheme.quant_max * column)
        zero = self.quantizer.used_zero_point()
        target = quantize(weight.detach(), scale, zero, scheme) * column
        total: Tensor = (target - inside).square().sum() / output_channels(self.layer)
        return total


@dataclass(frozen=True)
class OscillationReport:
    """Percentages of the weights that oscillate and that are frozen, in all and by layer."""

    layers: dict[str, tuple[float, float]]
    """(oscillating, frozen) by layer."""
    oscillating: float
    frozen: float

    def __str__(self) -> str:
        worst = sorted(self.layers.items(), key=lambda item: -item[1][0])[:10]
        rows = [f"  {name}: {turning:.2f} % oscillate, {held:.2f} % are frozen" for name, (turning, held) in worst]
        head = f"{self.oscillating:.2f} % of the weights oscillate, {self.frozen:.2f} % are frozen"
        return "\n".join([f"{head}; the layers with the most:" if rows else head, *rows])


class Oscillations:
    """Follows the integers of a model's weights from step to step, and holds the frozen ones.

    Followed are the weights of layers with at most `options.bits` bits, except those that BatchNorm is folded into in
    each step, whose integers move with its statistics. All processes of a run compute the same, since their weights are
    equal.

    Args:
        qmodel: a calibrated model from `prepare`.
        options: whether and when weights are frozen and dampened.
    """

    def __init__(self, qmodel: nn.Module, options: OscillationOptions) -> None:
        self.options = options
        self.weights: dict[str, _Weight] = {}
        for name, layer in qmodel.named_modules():
            quantizer = getattr(layer, "weight_quantizer", None)
            if not isinstance(quantizer, Quantizer) or getattr(layer, "live_norms", None):
                continue
            if quantizer.scheme.bits <= options.bits:
                self.weights[name] = _Weight(layer)

    def threshold(self, done: float) -> float | None:
        """Return the frequency above which weights are frozen, or None where none is frozen (section 4.3).

        Args:
            done: fraction of the run that is done.
        """
        options = self.options
        if not options.freeze or done < options.start:
            return None
        # A high threshold first: only the worst weights are frozen while the others can still find their integers.
        return options.freeze_to + (options.freeze_from - options.freeze_to) * (1 - self._cosine_rise(done))

    def _cosine_rise(self, done: float) -> float:
        """Return a number that rises from 0, at `options.start`, to 1, at the end of the run, by a cosine."""
        # Sections 4.2 and 4.3 anneal both along a cosine: the weight of the dampening up, the threshold of the freezing
        # down.
        return 0.5 * (1 - math.cos(math.pi * (done - self.options.start) / (1 - self.options.start)))

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        """Follow the weights over an optimizer step; `done` is the fraction of the run that is done."""
        threshold = self.threshold(done)
        for weight in self.weights.values():
            weight.step(self.options.momentum, threshold)

    def dampening(self, done: float) -> Tensor:
        """Return the loss term that pulls weights to their integers, []; 0 before `options.start` (section 4.2)."""
        if self.options.dampening == 0 or done < self.options.start or not self.weights:
            return torch.zeros(())
        total = torch.stack([weight.distance() for weight in self.weights.values()]).sum()
        return self.options.dampening * self._cosine_rise(done) * total

    def shares(self) -> dict[str, float]:
        """Return the percentages of the followed weights that oscillate and that are frozen; {} without any."""
        if not self.weights:
            return {}
        report = self.report()
        return {"oscillating": report.oscillating, "frozen": report.frozen}

    def report(self) -> OscillationReport:
        """Return the percentages of weights that oscillate and that are frozen, layer by layer."""
        counts = {
            name: (int((w.frequency > OSCILLATING_FREQUENCY).sum()), int(w.frozen.sum()), w.frequency.numel())
            for name, w in self.weights.items()
        }
        turning, held, total = (sum(column) for column in zip(*counts.values(), strict=True)) if counts else (0, 0, 1)
        layers = {name: (100 * a / n, 100 * b / n) for name, (a, b, n) in counts.items()}
        return OscillationReport(layers, 100 * turning / total, 100 * held / total)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the oscillation state of all layers."""
        return {f"{name}.{key}": getattr(w, key) for name, w in self.weights.items() for key in STATE_TENSORS}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore a state that `state_dict` returned.

        Raises:
            CheckpointError: the state belongs to other layers.
        """
        expected = {key: value.shape for key, value in self.state_dict().items()}
        if {key: value.shape for key, value in state.items()} != expected:
            raise CheckpointError(
                "The state of the oscillations belongs to another model or to other bits, so it does not say which "
                "weights are frozen. Resume with the model and the options that the run was started with."
            )
        for name, weight in self.weights.items():
            for key in STATE_TENSORS:
                found = getattr(weight, key)
                setattr(weight, key, state[f"{name}.{key}"].to(found.device, found.dtype).clone())


STATE_TENSORS = ("before", "direction", "frequency", "average", "frozen")
