"""The Accelerator of a run: its device, precision and processes."""

import os
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch

from halfeven.distributed import world_size
from halfeven.errors import ConfigError
from halfeven.imports import extra
from halfeven.options import Auto, Options, PositiveInt, formerly
from halfeven.quantization.compile import compiler_works

if TYPE_CHECKING:
    from accelerate import Accelerator

ACCELERATE_PRECISIONS = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """The device and the precision of the work."""

    kind: Literal["auto", "cpu", "cuda"] = "auto"
    """"auto": the accelerator of this process if there is one, else the CPU. "cuda": a GPU, or an error."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision of matrix products in training; --amp chooses the mixed precision that the device can do."""
    channels_last: bool = False
    """Give the model images with the channels last in memory in training steps, as convolutions of GPUs prefer."""
    compile: bool = False
    """Run training steps with the whole model compiled by `torch.compile`, which takes minutes at first."""
    tf32: bool | Auto = "auto"
    """Multiply in TF32 on NVIDIA GPUs that have it, which rounds float32; "auto": as PyTorch does by itself."""
    threads: Annotated[PositiveInt | Auto, formerly(0)] = "auto"
    """CPU threads of each process; "auto": as PyTorch decides."""


def make_accelerator(options: DeviceOptions) -> "Accelerator":
    """Join the processes of this run, as `torchrun` or `accelerate launch` started them, or work alone.

    Raises:
        ConfigError: there is no such device, or it cannot do the precision.
    """
    check_device(options)
    with extra("train", "Training"):
        from accelerate import Accelerator, DistributedDataParallelKwargs

    if options.threads != "auto":
        torch.set_num_threads(options.threads)
    if options.tf32 != "auto":
        torch.backends.cuda.matmul.allow_tf32 = options.tf32
        torch.backends.cudnn.allow_tf32 = options.tf32
    # Each process keeps its own BatchNorm statistics between averages: sending them at every step would slow all down.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    accelerator = Accelerator(
        cpu=options.kind == "cpu" or not torch.accelerator.is_available(),
        mixed_precision=ACCELERATE_PRECISIONS[options.precision],
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if options.kind == "cuda" and accelerator.device.type != "cuda":
        raise ConfigError(
            f'device.kind="cuda" asks for a GPU, and Accelerate was set up for the {accelerator.device.type} (by '
            "ACCELERATE_USE_CPU, its configuration, or an Accelerator that was made before). Everything would be done "
            'there. Change that set-up, or set device.kind to "auto".'
        )
    return accelerator


def described_processes(device: torch.device) -> str:
    """Return how many processes the run has, and on what, as a sentence; with a warning where more were asked for."""
    count = world_size()
    found = f"Training in {count} process{'es' if count > 1 else ''}, on {device.type}."
    # On CPUs, and without its --multi_gpu, `accelerate launch` starts a single process whatever --num_processes says,
    # and passes on no more of it than an address at which several would have met.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if count == 1 and launched and "WORLD_SIZE" not in os.environ:
        found += (
            " `accelerate launch` was given --num_processes of more than 1, and has started one process, as it does on "
            "CPUs. `torchrun --nproc_per_node N` starts N."
        )
    return found


def check_device(options: DeviceOptions) -> None:
    """Refuse what this process cannot do: a device, a precision of the device, or compilation.

    Raises:
        ConfigError: there is no GPU for "cuda", "float16" is asked of a CPU, or nothing can be compiled.
    """
    if options.compile and not compiler_works():
        raise ConfigError(
            "device.compile=True compiles the model by torch.compile, and that cannot build a kernel here (there is no "
            "C++ compiler, or HALFEVEN_COMPILE is 0). Install a compiler, or leave the option out."
        )
    if options.kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f'device.kind="cuda" asks for a GPU, and PyTorch {torch.__version__} finds none in this process, so '
            "everything would be done on the CPU. Check `nvidia-smi`, CUDA_VISIBLE_DEVICES and that this PyTorch is "
            'built for CUDA, or set device.kind to "auto" or "cpu".'
        )
    cpu = options.kind == "cpu" or not torch.accelerator.is_available()
    if options.precision == "float16" and cpu:
        raise ConfigError(
            'device.precision="float16" was asked for on the CPU, whose float16 training loses small gradients. '
            'Use "bfloat16" (or --amp, which chooses it), or "float32".'
        )


def mixed_precision() -> Literal["bfloat16", "float16"]:
    """Return the mixed precision that this machine can do: bfloat16, or float16 on older GPUs."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return "bfloat16"
