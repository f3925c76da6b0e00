"""halfeven on a GPU: parity, time and memory.

    python benchmarks/gpu.py [--parts kernels models step ...] [--minutes 10] [--json FILE]
    python benchmarks/gpu.py --device cpu --small      # tries the script, on small networks

Parts: parity of the fused kernels with the unfused functions on the CPU; outputs of whole models; time of a training
step over float's for resnet50 and a ViT-S under bfloat16, without and with torch.compile of the whole model; memory;
two processes (nccl where there are two GPUs, else gloo); and TensorRT's files, where tensorrt is installed. The exit
code is 1 where a part fails or something disagrees, and 2 where there is no CUDA device.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from gpu_parts import engines, parity, processes, steps
from gpu_parts.job import Job

PARTS: dict[str, Callable[[Job], bool]] = {
    "kernels": parity.fake_quantization,
    "models": parity.whole_models,
    "step": lambda job: steps.ratios(job, compiled=False),
    "memory": steps.memory,
    "processes": processes.run,
    "tensorrt": engines.files,
    "compiled": lambda job: steps.ratios(job, compiled=True),
}
"""In this order: compilation takes longest, and comes last, where the time may end."""

NO_CUDA = (
    "There is no CUDA device here, so nothing of a GPU can be measured: run this on a machine with one, or try the "
    "script with --device cpu --small."
)


def machine(job: Job) -> dict[str, Any]:
    found = {"date": date.today().isoformat(), "torch": torch.__version__, "processor": platform.machine()}
    return found | (
        {"gpu": torch.cuda.get_device_name(job.device), "gpus": torch.cuda.device_count()} if job.cuda else {}
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_CUDA, file=sys.stderr)
        return 2
    job = Job(torch.device(options.device), options.small, time.monotonic() + 60 * options.minutes)
    if options.worker:
        processes.work(job)
        return 0
    job.report("machine", **machine(job))
    good = True
    for name in options.parts:
        if job.left < 0:
            job.report(name, skipped="no time was left")
            continue
        try:
            good &= PARTS[name](job)
        except Exception as error:  # of a driver, a compiler or TensorRT: the other parts are measured all the same
            job.report(name, failed=f"{type(error).__name__}: {error}")
            good = False
        if job.cuda:
            torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps(job.rows, indent=2))
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
