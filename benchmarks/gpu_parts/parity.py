"""Fused kernels and whole models on the device beside the same, unfused, on the CPU."""

import itertools
from typing import Any

import torch

import halfeven as he
from gpu_parts.job import Job, images, network
from halfeven.quantization import compile as kernels
from halfeven.quantization.fake_quantize import UNCLIPPED, fake_quantize
from halfeven.quantization.scheme import Scheme

LARGEST_GRADIENT_DIFFERENCE = 1e-4
"""Of a sum over all elements, over its size: the devices add in another order."""

SHARE_AT_TIES = 1e-5
"""Largest share of integers that may differ, by 1: a division on a GPU may fall on the other side of a tie."""

SCHEMES = {
    "per tensor": Scheme(bits=8, signed=False, symmetric=False),
    "per channel": Scheme(bits=8, axis=0),
    "4 bits": Scheme(bits=4, axis=0),
}

CASES = (
    ("linear", True, torch.float32),
    ("linear", False, torch.bfloat16),
    ("log", False, torch.float32),
    (None, True, torch.bfloat16),
)
"""Domain of the scale, an activation that clips, and type: each value of each at least once; each case is compiled."""


def fake_quantization(job: Job) -> bool:
    """Compare forward and backward of fake-quantization; return True where all agree, and all was fused."""
    if not kernels.compiler_works():
        job.report("parity of kernels", failed="torch.compile builds no kernels here, so there are none to compare")
        return False
    shape = (16, 8, 9, 9) if job.small else (256, 64, 28, 28)
    agree = True
    cases = CASES[:1] if job.small else CASES
    for (name, scheme), (domain, clipped, dtype) in itertools.product(SCHEMES.items(), cases):
        found = _compared(job, shape, scheme, domain, clipped=clipped, dtype=dtype)
        close = found["integers that differ"] <= SHARE_AT_TIES
        close &= found["largest gradient difference"] <= LARGEST_GRADIENT_DIFFERENCE
        agree &= close
        kind = f"{name}, domain {domain}, clipped {clipped}, {str(dtype).removeprefix('torch.')}"
        job.report("parity of kernels", case=kind, agree=close, **found)
    job.report("parity of kernels", agree=agree)
    return agree


def _compared(
    job: Job, shape: tuple[int, ...], scheme: Scheme, domain: Any, *, clipped: bool, dtype: torch.dtype
) -> dict[str, float]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator).to(dtype)
    incoming = torch.randn(shape, generator=generator).to(dtype)
    channels = () if scheme.axis is None else (shape[scheme.axis],)
    scale = torch.rand(channels, generator=generator) * 0.02 + 0.01
    zero = torch.full(channels, 0 if scheme.symmetric else 37, dtype=torch.int32)
    stored = scale.log2() if domain == "log" else scale
    clip = (0.0, 2.5) if clipped else UNCLIPPED
    results = []
    for device, fuse in ((torch.device("cpu"), False), (job.device, True)):
        own = [one.to(device).requires_grad_() for one in (x, stored if domain else scale)]
        with _fusing(fuse=fuse):
            y = fake_quantize(own[0], own[1], zero.to(device), scheme, domain=domain, clip=clip)
            gradients = torch.autograd.grad(y, own if domain else own[:1], incoming.to(device))
        results.append([one.float().cpu() for one in (y.detach(), *gradients)])
    (expected, *before), (found, *after) = results
    differs = float((expected != found).float().mean())
    sums = zip(before[1:], after[1:], strict=True)
    moved = float((before[0] != after[0]).float().mean())
    largest = max((float((a - b).abs().max() / a.abs().max()) for a, b in sums), default=0.0)
    return {"integers that differ": max(differs, moved), "largest gradient difference": largest}


class _fusing:
    """Compute with fused kernels or without them."""

    def __init__(self, *, fuse: bool) -> None:
        self.fuse = fuse

    def __enter__(self) -> None:
        self.before = kernels.compiler_works()
        kernels._works = self.fuse and self.before

    def __exit__(self, *error: object) -> None:
        kernels._works = self.before


@torch.no_grad()
def whole_models(job: Job) -> bool:
    """Compare the outputs of quantized networks on the device and on the CPU, in float32 without TF32.

    They agree where they differ by at most 1/32 of the largest output.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    agree = True
    for name in job.networks:
        batch = images(job, 2)
        qmodel = he.calibrate(he.prepare(network(job, name).eval(), batch), [batch]).eval()
        expected = qmodel(batch)
        found = qmodel.to(job.device)(batch.to(job.device)).cpu()
        close = float((found - expected).abs().max()) <= float(expected.abs().max()) / 32
        agree &= close
        difference = float((found - expected).norm() / expected.norm())
        job.report("parity of models", network=name, agree=close, difference=difference)
    return agree
