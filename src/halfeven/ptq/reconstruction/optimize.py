"""Learning a unit: rounding, activation scales and biases such that a unit gives what its float form gives.

The error of a unit is the mean square of the difference, over that of the float output: the reciprocal of the SQNR.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from halfeven.graph.view import module_of
from halfeven.layerwise.activations import Stream, Values, run
from halfeven.layerwise.blocks import Unit
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction.adaround import Rounding, sharpness
from halfeven.ptq.reconstruction.conv_as_matmul import by_product, has_few_positions
from halfeven.quantization.arithmetic import dequantize, snap
from halfeven.quantization.fake_quantize import effective_scale, fake_quantize
from halfeven.quantization.quantizer import Mode, Quantizer

MASKS = 2**22
"""Random decisions that are drawn at once; masks are cut out of them at random places, which costs next to nothing."""


@dataclass(frozen=True)
class Outcome:
    """The error of a unit with its weights rounded to nearest, and with what was learned."""

    before: float
    after: float
    undecided: float
    """Share of the roundings that the regularizer had not driven to 0 or 1."""


def decibels(error: float) -> float:
    """Signal to quantization noise ratio in dB of a relative error."""
    return -10 * math.log10(max(error, 1e-30))


def learn(unit: Unit, floats: Stream, quantized: Stream, options: PTQOptions, seed: int) -> Outcome:
    """Learn a unit and leave it with decided roundings; where nothing was gained, as it was, its weights rounded to
    nearest.

    Args:
        floats: stream of the float model, already past the unit: what it gave is the target.
        quantized: stream of the quantized model, before the unit.
        options: `iterations` steps; rates of 0 leave scales or biases as they are.
        seed: of the order of batches and of dropped activations.
    """
    powers = _powers(unit, floats)
    before = error(unit, floats, quantized, powers)
    learned = _Learned(unit, options)
    give_back = learned.nearest()
    if before > 0 and (learned.roundings or learned.groups):
        _descend(unit, floats, quantized, options, learned, {n: p * before for n, p in powers.items()}, seed)
    undecided = max((r.undecided for r in learned.roundings.values()), default=0.0)
    learned.decide()
    after = error(unit, floats, quantized, powers)
    if after > before:
        give_back()
        after = before
    return Outcome(before, after, undecided)


@torch.no_grad()
def error(unit: Unit, floats: Stream, quantized: Stream, powers: Mapping[fx.Node, Tensor]) -> float:
    """Relative error of a unit over all batches, summed over its outputs."""
    errors = [
        float(_distance(run(unit, quantized.inputs(unit, batch)), floats.outputs(unit, batch), powers))
        for batch in range(len(quantized.batches))
    ]
    return sum(errors) / len(errors)


def _powers(unit: Unit, floats: Stream) -> dict[fx.Node, Tensor]:
    """Mean square of each real-valued output of the float unit."""
    batches = len(floats.batches)
    powers: dict[fx.Node, Tensor] = {}
    for batch in range(batches):
        for node, value in floats.outputs(unit, batch).items():
            if _is_real(value):
                powers[node] = powers.get(node, 0.0) + value.double().square().mean() / batches
    return {node: power.float().clamp(min=1e-12) for node, power in powers.items()}


def _distance(found: Values, wanted: Values, powers: Mapping[fx.Node, Tensor]) -> Tensor:
    errors = [F.mse_loss(found[n].float(), wanted[n].float()) / power for n, power in powers.items()]
    return torch.stack(errors).sum()


class _Learned:
    """What is learned of a unit: the rounding of its weights, the scales of its activations, its biases."""

    def __init__(self, unit: Unit, options: PTQOptions) -> None:
        self.layers = _layers(unit)
        self.quantizers: dict[Any, Quantizer] = {layer: layer.weight_quantizer for layer in self.layers}
        self.roundings = {
            layer: Rounding.of(layer.weight, quantizer.used_scale(layer.weight), quantizer.scheme)
            for layer, quantizer in self.quantizers.items()
        }
        self.groups: list[dict[str, Any]] = []
        self.scales: dict[Quantizer, Tensor] = {}
        if options.scale_rate:
            for quantizer in _activation_quantizers(unit):
                self.scales[quantizer] = effective_scale(quantizer.scale.detach()).clone()
                self._add(self.scales[quantizer], options.scale_rate * float(quantizer.scale))
        if options.bias_rate:
            for layer in self.layers:
                if layer.bias is not None:
                    self._add(
                        layer.bias, options.bias_rate * float(layer.weight.detach().flatten(1).norm(dim=1).mean())
                    )
        if options.learn_weight_scales:
            for rounding in self.roundings.values():
                self._add(rounding.scale, options.scale_rate * float(rounding.scale.mean()))

    def _add(self, tensor: Tensor, rate: float) -> None:
        self.groups.append({"params": [tensor.requires_grad_()], "lr": rate})

    @contextmanager
    def soft(self) -> Iterator[None]:
        """While this lasts, the layers compute with their soft weights."""
        for layer, rounding in self.roundings.items():
            layer.weight_quantizer = _SoftWeight(rounding)
        try:
            yield
        finally:
            for layer, quantizer in self.quantizers.items():
                layer.weight_quantizer = quantizer

    @torch.no_grad()
    def nearest(self) -> Callable[[], None]:
        """A function that gives the unit back as it is now, its weights rounded to nearest."""
        weights = {layer: q(layer.weight).clone() for layer, q in self.quantizers.items()}
        biases = {layer: layer.bias.clone() for layer in self.layers if layer.bias is not None}
        scales = {q: q.scale.clone() for q in self.scales}
        weight_scales = {q: q.used_scale(layer.weight).clone() for layer, q in self.quantizers.items()}

        def give_back() -> None:
            for layer, weight in weights.items():
                layer.weight.data.copy_(weight)
            for layer, bias in biases.items():
                layer.bias.data.copy_(bias)
            for quantizer, scale in (scales | weight_scales).items():
                quantizer.fix_scale(scale)

        return give_back

    @torch.no_grad()
    def decide(self) -> None:
        """Round as was learned: put weights on their grids, and fix the scales, which must not move any more."""
        for layer, rounding in self.roundings.items():
            quantizer = self.quantizers[layer]
            scale = snap(rounding.scale.detach().abs()).reshape(quantizer.scale.shape)
            layer.weight.copy_(dequantize(rounding.integers, scale, torch.zeros_like(scale), quantizer.scheme))
            quantizer.fix_scale(scale)
        for quantizer, scale in self.scales.items():
            quantizer.fix_scale(effective_scale(scale.detach()))
        for group in self.groups:
            for tensor in group["params"]:
                tensor.requires_grad_(False)


def _layers(unit: Unit) -> list[Any]:
    """The layers of a unit whose rounding is not decided yet: one that is used again was learned at its first use."""
    layers: list[Any] = [module_of(node) for node in unit.layers]
    return list(dict.fromkeys(layer for layer in layers if not layer.weight_quantizer.state.fixed))


def _activation_quantizers(unit: Unit) -> list[Quantizer]:
    modules = (module_of(node) for node in unit.nodes if node.op == "call_module")
    return list(dict.fromkeys(m for m in modules if isinstance(m, Quantizer) and not (m.weight or m.state.fixed)))


def learned_quantizers(unit: Unit, options: PTQOptions) -> list[Quantizer]:
    """The quantizers whose scales are final once a unit has been learned."""
    weights = [layer.weight_quantizer for layer in _layers(unit)]
    return weights + (_activation_quantizers(unit) if options.scale_rate else [])


class _SoftWeight(nn.Module):
    """Stands in for a layer's weight quantizer while its rounding is learned."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding, self.mode = rounding, Mode.FLOAT

    def forward(self, weight: Tensor) -> Tensor:
        return self.rounding.soft


def _descend(
    unit: Unit,
    floats: Stream,
    quantized: Stream,
    options: PTQOptions,
    learned: _Learned,
    powers: Mapping[fx.Node, Tensor],
    seed: int,
) -> None:
    """The steps of gradient descent; the rounding is pushed to 0 or 1 after the warm start."""
    generator = torch.Generator().manual_seed(seed)
    dropping = _Dropping(options.drop, generator, learned)
    optimizer = torch.optim.Adam(learned.groups) if learned.groups else None
    steps = options.steps
    warm = round(options.warm_start * steps)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if optimizer else None
    weights = sum(rounding.v.numel() for rounding in learned.roundings.values())
    with learned.soft(), torch.enable_grad():
        for step, batch in enumerate(_batches(len(quantized.batches), steps, generator)):
            values = quantized.inputs(unit, batch)
            if options.drop:
                values = dropping.mixed(values, floats.inputs(unit, batch))
            found = run(unit, values, dropping.call)
            _distance(found, floats.outputs(unit, batch), powers).backward()  # type: ignore[no-untyped-call]
            if optimizer and decay:
                for rounding in learned.roundings.values():
                    rounding.scale_gradient()
                optimizer.step()
                optimizer.zero_grad()
                decay.step()
            push = 0.0 if step < warm or not weights else options.regularization / weights  # none: scales alone learn
            beta = sharpness(max(0.0, (step - warm) / (steps - warm)))
            for rounding in learned.roundings.values():
                rounding.step(options.rounding_rate, push, beta)


def _batches(count: int, steps: int, generator: torch.Generator) -> Iterator[int]:
    """The numbers of batches in random order, all of them before one comes again."""
    for step in range(steps):
        if step % count == 0:
            order = torch.randperm(count, generator=generator).tolist()
        yield order[step % count]


class _Dropping:
    """Leaves activations in float at random while a unit is learned (QDrop, arXiv 2203.05740, section 4.3)."""

    def __init__(self, probability: float, generator: torch.Generator, learned: _Learned) -> None:
        self.probability, self.generator = probability, generator
        self.scales, self.roundings = learned.scales, learned.roundings
        self.pool = torch.empty(0, dtype=torch.bool)

    def mixed(self, values: Values, float_values: Values) -> Values:
        """What a unit reads, each element from the quantized or from the float stream."""
        return {node: self._choose(float_values[node], value) for node, value in values.items()}

    def call(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Run a module; an activation quantizer with the scale that is learned, and leaving out at random."""
        if module in self.roundings and has_few_positions(module, args[0]):
            return by_product(module, args[0], self.roundings[module].soft)
        if not isinstance(module, Quantizer):
            return module(*args)
        x, scale = args[0], self.scales.get(module)
        if scale is None:
            quantized = module(x)
        else:
            quantized = fake_quantize(x, effective_scale(scale), module.zero_point, module.scheme)
        return self._choose(x, quantized) if not (module.weight or module.state.fixed) else quantized

    def _choose(self, kept: Any, quantized: Any) -> Any:
        if not self.probability or not _is_real(quantized):
            return quantized
        return torch.where(self._mask(quantized), kept, quantized)

    def _mask(self, x: Tensor) -> Tensor:
        count = x.numel()
        if 2 * count > len(self.pool):
            self.pool = torch.rand(max(MASKS, 4 * count), generator=self.generator) < self.probability
            self.pool = self.pool.to(x.device)
        start = int(torch.randint(len(self.pool) - count, (), generator=self.generator))
        return self.pool[start : start + count].view(x.shape)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
