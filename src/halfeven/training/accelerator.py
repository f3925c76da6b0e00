"""The Accelerator of a run: its device, precision and processes."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from halfeven.errors import ConfigError
from halfeven.imports import extra

if TYPE_CHECKING:
    from accelerate import Accelerator

MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where and in which precision the work is done."""

    kind: Literal["auto", "cpu"] = "auto"
    """"auto": the accelerator of this process if there is one, else the CPU."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of matrix products in training; --amp chooses the mixed precision that the device can do."""
    threads: int = 0
    """CPU threads of each process; 0: as PyTorch decides."""


def make_accelerator(options: DeviceOptions) -> "Accelerator":
    """Join the processes of this run, as `torchrun` or `accelerate launch` started them, or work alone.

    Raises:
        ConfigError: the device cannot do the precision.
    """
    with extra("train", "Training"):
        from accelerate import Accelerator, DistributedDataParallelKwargs

    if options.threads > 0:
        torch.set_num_threads(options.threads)
    cpu = options.kind == "cpu" or not torch.accelerator.is_available()
    if options.precision == "float16" and cpu:
        raise ConfigError(
            'device.precision="float16" was asked for on the CPU, whose float16 training loses small gradients. '
            'Use "bfloat16" (or --amp, which chooses it), or "float32".'
        )
    # Each process keeps its own BatchNorm statistics between averages: sending them at every step would slow all down.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    return Accelerator(
        cpu=cpu,
        mixed_precision=MIXED[options.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def mixed_precision() -> Literal["bfloat16", "float16"]:
    """The mixed precision that this machine can do: bfloat16, or float16 on older GPUs."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return "bfloat16"
