"""Deploying a small model and comparing its integers in the runtime with the simulations."""

import re
from typing import Any

import torch
from torch import nn

import halfeven as he
from halfeven.runtimes.cpu import adds_pairs_in_16_bits

SCHEME = "w7a8" if adds_pairs_in_16_bits() else "w8a8"
"""What integer kernels compute exactly on this processor."""


class SideBySide(nn.Module):
    """Networks that read one input, each with results of its own: prepared, exported and verified at once."""

    def __init__(self, networks: dict[str, nn.Module]):
        super().__init__()
        self.networks = nn.ModuleDict({re.sub(r"\W+", "_", name): network for name, network in networks.items()})

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {name: network(x) for name, network in self.networks.items()}


def trained(model: nn.Module) -> nn.Module:
    """A model with random BatchNorm statistics and affine parameters, as if it had been trained, in eval mode."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model.eval()


def quantized(model: nn.Module, shape: tuple[int, ...], **options) -> tuple[nn.Module, list[torch.Tensor]]:
    """A calibrated model, and other batches than it was calibrated on, some of their values outside of its ranges."""
    generator = torch.Generator().manual_seed(11)
    calibration = [torch.randn(shape, generator=generator) for _ in range(2)]
    others = [torch.randn(shape, generator=generator) * 1.2 for _ in range(3)]
    scheme = "w8a8" if options.get("target") == "tensorrt" else SCHEME  # which ONNX's evaluator computes, not a kernel
    options = {"activation_observer": "minmax", "scheme": scheme} | options
    qmodel = he.prepare(trained(model), calibration[0], **options)
    return he.calibrate(qmodel, calibration).eval(), others


def deployed(model, shape, path, **options):
    """The report of a model that was quantized, exported and verified."""
    qmodel, batches = quantized(model, shape, **options)
    he.export(qmodel, path)
    return he.verify(qmodel, path, batches, timed=False)
