"""Optimization of one block: learn rounding, activation scales and biases so that it gives what its float form gives.

The error of a block is the mean squared difference of its outputs, relative to the mean square of the float outputs:
the reciprocal of the SQNR. It is minimized by gradient descent (AdaRound, arXiv:2004.10568, section 3.2; BRECQ,
arXiv:2102.05426, section 3; QDrop, arXiv:2203.05740, section 4.3).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from halfeven.graph.view import Op, module_of
from halfeven.layerwise.activations import ActivationCache, Values, run
from halfeven.layerwise.blocks import Block
from halfeven.ptq.equalization.layer_pairs import weight_by_channel
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction.adaround import Rounding, regularizer_sharpness
from halfeven.ptq.reconstruction.conv_as_matmul import conv_as_matmul, has_few_positions
from halfeven.ptq.reconstruction.minibatches import cut_samples, samples_of_a_step
from halfeven.ptq.reconstruction.mixing import mix_by_mask
from halfeven.quantization.arithmetic import dequantize, representable
from halfeven.quantization.fake_quantize import effective_scale, fake_quantize
from halfeven.quantization.quantizer import Mode, Quantizer

MIN_RANDOM_DECISIONS = 2**22
"""Smallest number of random decisions drawn at once; masks are cut out of them at random places, which costs little."""


@dataclass(frozen=True)
class BlockResult:
    """Relative errors of a block."""

    before: float
    """With its weights rounded to nearest."""
    after: float
    """With the learned rounding, scales and biases."""
    undecided: float
    """Largest fraction of a weight's roundings that the regularizer had not driven to 0 or 1."""


def optimize_block(
    block: Block, floats: ActivationCache, quantized: ActivationCache, options: PTQOptions, seed: int
) -> BlockResult:
    """Optimize a block, and put its weights on their grids.

    Where the error does not fall, the block keeps its weights rounded to nearest and its earlier scales and biases.

    Args:
        block: the block.
        floats: cache of the float model, with the block's outputs: they are the target.
        quantized: cache of the quantized model, before the block.
        options: number of steps, rates, regularization; a rate of 0 leaves scales or biases as they are.
        seed: seed of the order of batches and of dropped activations.
    """
    # The error is measured with the block as it came: weights rounded to nearest, scales as calibrated.
    powers = _output_powers(block, floats)
    before = relative_error(block, floats, quantized, powers)
    parameters = _Parameters(block, options)
    # Taken now, because the descent changes scales and biases in place.
    restore_nearest = parameters.rounded_to_nearest()
    if before > 0 and (parameters.roundings or parameters.groups):
        # The loss is 1 at the start, so that one weight of the regularizer suits blocks of any error.
        loss_powers = {node: power * before for node, power in powers.items()}
        _minimize_error(block, floats, quantized, options, parameters, loss_powers, seed)
    undecided = max((rounding.undecided for rounding in parameters.roundings.values()), default=0.0)
    # Where nothing was learned, this rounds to nearest as well: V starts at the fractional part of W / s, and
    # `Rounding.integers` rounds up from 1/2 on.
    parameters.fix()
    after = relative_error(block, floats, quantized, powers)
    # The loss is that of soft weights on single batches; rounded weights on all batches may come out worse.
    if after > before:
        restore_nearest()
        after = before
    return BlockResult(before, after, undecided)


@torch.no_grad()
def relative_error(
    block: Block, floats: ActivationCache, quantized: ActivationCache, powers: Mapping[fx.Node, Tensor]
) -> float:
    """Return the mean relative error of a block over all batches, summed over its outputs.

    Args:
        block, floats, quantized: as for `optimize_block`.
        powers: mean square of each output in the float model, [].
    """
    errors = [
        float(_relative_error(run(block, quantized.inputs(block, batch)), floats.outputs(block, batch), powers))
        for batch in range(len(quantized.batches))
    ]
    return sum(errors) / len(errors)


def _output_powers(block: Block, floats: ActivationCache) -> dict[fx.Node, Tensor]:
    """Return the mean square of each floating-point output of the float block, []."""
    batches = len(floats.batches)
    powers: dict[fx.Node, Tensor] = {}
    for batch in range(batches):
        for node, value in floats.outputs(block, batch).items():
            if _is_floating_point(value):
                powers[node] = powers.get(node, 0.0) + value.double().square().mean() / batches
    # An output of zeros has no power, and a division by 0 would make the whole loss NaN.
    return {node: power.float().clamp(min=1e-12) for node, power in powers.items()}


def _relative_error(found: Values, expected: Values, powers: Mapping[fx.Node, Tensor]) -> Tensor:
    errors = [F.mse_loss(found[n].float(), expected[n].float()) / power for n, power in powers.items()]
    return torch.stack(errors).sum()


# What is learned


class _Parameters:
    """The parameters of a block that are learned: rounding of weights, scales of activations and weights, biases."""

    def __init__(self, block: Block, options: PTQOptions) -> None:
        self.layers = _layers_to_round(block)
        self.quantizers: dict[Any, Quantizer] = {layer: layer.weight_quantizer for layer in self.layers}
        self.roundings = {
            layer: Rounding.of(layer.weight, quantizer.used_scale(layer.weight), quantizer.scheme)
            for layer, quantizer in self.quantizers.items()
        }
        # A group of Adam's for each tensor, because each has a learning rate of its own.
        self.groups: list[dict[str, Any]] = []
        self.scales: dict[Quantizer, Tensor] = {}
        if options.scale_rate:
            self._add_activation_scales(block, options.scale_rate)
        if options.bias_rate:
            self._add_biases(options.bias_rate)
        if options.learn_weight_scales:
            for rounding in self.roundings.values():
                self._add_group(rounding.scale, options.scale_rate * float(rounding.scale.mean()))

    def _add_activation_scales(self, block: Block, rate: float) -> None:
        for quantizer in _activation_quantizers(block):
            self.scales[quantizer] = effective_scale(quantizer.scale.detach()).clone()
            # Adam's steps have the size of the learning rate, whatever the gradient: a rate relative to the number
            # moves scales of any size alike.
            self._add_group(self.scales[quantizer], rate * float(quantizer.scale))

    def _add_biases(self, rate: float) -> None:
        for layer in self.layers:
            if layer.bias is not None:
                # By output channel: a transposed convolution's weight has its inputs on the first axis.
                size = float(weight_by_channel(layer).detach().transpose(0, 1).flatten(2).norm(dim=2).mean())
                self._add_group(layer.bias, rate * size)

    def _add_group(self, tensor: Tensor, rate: float) -> None:
        self.groups.append({"params": [tensor.requires_grad_()], "lr": rate})

    @contextmanager
    def soft_weights(self) -> Iterator[None]:
        """Compute the layers with their soft weights within the context; put their quantizers back at the end."""
        for layer, rounding in self.roundings.items():
            layer.weight_quantizer = _SoftWeight(rounding)
        try:
            yield
        finally:
            for layer, quantizer in self.quantizers.items():
                layer.weight_quantizer = quantizer

    @torch.no_grad()
    def rounded_to_nearest(self) -> Callable[[], None]:
        """Return a function that restores the block as it is now, with its weights rounded to nearest."""
        weights = {layer: q(layer.weight).clone() for layer, q in self.quantizers.items()}
        biases = {layer: layer.bias.clone() for layer in self.layers if layer.bias is not None}
        scales = {q: q.scale.clone() for q in self.scales}
        weight_scales = {q: q.used_scale(layer.weight).clone() for layer, q in self.quantizers.items()}

        def restore() -> None:
            for layer, weight in weights.items():
                layer.weight.data.copy_(weight)
            for layer, bias in biases.items():
                layer.bias.data.copy_(bias)
            for quantizer, scale in (scales | weight_scales).items():
                quantizer.fix_scale(scale)

        return restore

    @torch.no_grad()
    def fix(self) -> None:
        """Put the weights on their grids as was learned, and fix the scales: a moved scale would undo the rounding."""
        for layer, rounding in self.roundings.items():
            quantizer = self.quantizers[layer]
            # Snapped first: the weights must lie on the grid of the scale that is stored.
            power_of_two = quantizer.scheme.power_of_two
            scale = representable(rounding.scale.detach().abs(), power_of_two).reshape(quantizer.scale.shape)
            layer.weight.copy_(dequantize(rounding.integers, scale, torch.zeros_like(scale), quantizer.scheme))
            quantizer.fix_scale(scale)
        for quantizer, scale in self.scales.items():
            quantizer.fix_scale(effective_scale(scale.detach(), power_of_two=quantizer.scheme.power_of_two))
        for group in self.groups:
            for tensor in group["params"]:
                tensor.requires_grad_(False)


def _layers_to_round(block: Block) -> list[Any]:
    """Return the layers with undecided rounding: a layer that is called again was learned at its first call."""
    layers: list[Any] = [module_of(node) for node in block.layers]
    return list(dict.fromkeys(layer for layer in layers if not layer.weight_quantizer.state.fixed))


def _activation_quantizers(block: Block) -> list[Quantizer]:
    modules = (Op(node).module for node in block.nodes)
    return list(dict.fromkeys(m for m in modules if isinstance(m, Quantizer) and not (m.weight or m.state.fixed)))


def learned_quantizers(block: Block, options: PTQOptions) -> list[Quantizer]:
    """Return the quantizers whose scales are final once a block has been optimized."""
    weights = [layer.weight_quantizer for layer in _layers_to_round(block)]
    return weights + (_activation_quantizers(block) if options.scale_rate else [])


class _SoftWeight(nn.Module):
    """Takes the place of a layer's weight quantizer while its rounding is learned."""

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.rounding = rounding
        self.mode = Mode.FLOAT

    def forward(self, weight: Tensor) -> Tensor:
        return self.rounding.soft


# Gradient descent


def _minimize_error(
    block: Block,
    floats: ActivationCache,
    quantized: ActivationCache,
    options: PTQOptions,
    parameters: _Parameters,
    powers: Mapping[fx.Node, Tensor],
    seed: int,
) -> None:
    """Minimize the error plus the regularizer, which takes part after the warm start."""
    generator = torch.Generator().manual_seed(seed)
    qdrop = _QDrop(options.drop, generator, parameters)
    # For scales and biases alone: the roundings have a fused Adam of their own (`Rounding.step`).
    optimizer = torch.optim.Adam(parameters.groups) if parameters.groups else None
    steps = options.steps
    # AdaRound's warm start: first the error alone moves the soft weights, then the regularizer decides them, in the
    # last step at least.
    warm = min(round(options.warm_start * steps), steps - 1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if optimizer else None
    # What a step needs to know of the block: how many samples carry enough positions, and how many roundings share the
    # regularizer.
    samples = samples_of_a_step(block)
    weights = sum(rounding.v.numel() for rounding in parameters.roundings.values())
    with parameters.soft_weights(), torch.enable_grad():
        for step, batch in enumerate(_shuffled_batches(len(quantized.batches), steps, generator)):
            in_float = floats.inputs(block, batch) if options.drop else {}
            # One batch of the block's quantized inputs, float inputs (for QDrop alone) and float outputs.
            stored = (quantized.inputs(block, batch), in_float, floats.outputs(block, batch))
            # Inputs and target are cut alike: the same samples of the quantized inputs, the float inputs and the float
            # outputs.
            values, in_float, expected = cut_samples(stored, samples, generator)
            if options.drop:
                # QDrop: each element of the block's input comes from the quantized or the float model at random, so
                # that the block learns no answer to one fixed noise.
                values = qdrop.mix(values, in_float)
            # The gradient reaches the soft weights as leaves, the learned scales through `qdrop.call`, and the biases.
            _relative_error(run(block, values, qdrop.call), expected, powers).backward()  # type: ignore[no-untyped-call]
            if optimizer and decay:
                for rounding in parameters.roundings.values():
                    # Before `Rounding.step`, which takes the gradient of the soft weight away.
                    rounding.set_scale_gradient()
                optimizer.step()
                optimizer.zero_grad()
                decay.step()
            # The regularizer is a mean over the weights; a block without weights learns scales alone.
            strength = 0.0 if step < warm or not weights else options.regularization / weights
            sharpness = regularizer_sharpness(max(0.0, (step - warm) / (steps - warm)))
            for rounding in parameters.roundings.values():
                rounding.step(options.rounding_rate, strength, sharpness)


def _shuffled_batches(count: int, steps: int, generator: torch.Generator) -> Iterator[int]:
    """Return indices of batches in random order; each batch comes once before any comes again."""
    for step in range(steps):
        if step % count == 0:
            order = torch.randperm(count, generator=generator).tolist()
        yield order[step % count]


class _QDrop:
    """Leaves activations in float at random while a block is optimized (QDrop, arXiv:2203.05740, section 4.3)."""

    def __init__(self, probability: float, generator: torch.Generator, parameters: _Parameters) -> None:
        self.probability = probability
        self.generator = generator
        self.scales = parameters.scales
        self.roundings = parameters.roundings
        self.decisions = torch.empty(0, dtype=torch.bool)

    def mix(self, quantized: Values, floats: Values) -> Values:
        """Return a block's inputs with each element from the quantized or the float model."""
        return {node: self._drop_to_float(floats[node], value) for node, value in quantized.items()}

    def call(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """Run a module of the block; an activation quantizer gets its learned scale, and drops at random."""
        # `run` calls the modules of the graph alone. The quantizer of a weight is called inside of its layer, where
        # `_SoftWeight` stands in for it.
        if module in self.roundings and has_few_positions(module, args[0]):
            return conv_as_matmul(module, args[0], self.roundings[module].soft)
        if not isinstance(module, Quantizer):
            return module(*args)
        x = args[0]
        scale = self.scales.get(module)
        if scale is None:
            quantized = module(x)
        else:
            used = effective_scale(scale, power_of_two=module.scheme.power_of_two)
            quantized = fake_quantize(x, used, module.zero_point, module.scheme)
        return self._drop_to_float(x, quantized) if not (module.weight or module.state.fixed) else quantized

    def _drop_to_float(self, in_float: Any, quantized: Any) -> Any:
        if not self.probability or not _is_floating_point(quantized):
            return quantized
        return mix_by_mask(self._random_mask(quantized), in_float, quantized)

    def _random_mask(self, x: Tensor) -> Tensor:
        count = x.numel()
        # At least twice the tensor, so that a mask can be cut at as many places as the tensor has elements.
        if 2 * count > len(self.decisions):
            drawn = torch.rand(max(MIN_RANDOM_DECISIONS, 4 * count), generator=self.generator)
            self.decisions = (drawn < self.probability).to(x.device)
        # The generator is on the CPU, so this waits for no device.
        start = int(torch.randint(len(self.decisions) - count, (), generator=self.generator))
        return self.decisions[start : start + count].view(x.shape)


def _is_floating_point(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
