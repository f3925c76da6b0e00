"""Peak memory of reconstruction: resnet18 at 224 pixels, with the bound on stored activations and without.

    python benchmarks/reconstruction_memory.py [--images 1024] [--memory 1 4 inf] [--json FILE]

For each bound (PTQOptions.memory, in GB) a process of its own reconstructs the layers of timm's resnet18, with random
weights, from random images that are made when they are asked for. It reports by how much the peak of its resident
memory exceeds that before the reconstruction, and how long it took. Few iterations suffice: the memory does not depend
on their number.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import timm
import torch
from torch import Tensor

import halfeven as he
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction.reconstruct import adaround, reconstruct

BATCH = 32


class RandomImages:
    """Batches that take no memory before they are asked for, the same ones at every pass."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, self.count, BATCH):
            yield torch.randn(min(BATCH, self.count - start), 3, self.size, self.size, generator=generator)


def measure(pipe: Connection, memory: float, options: argparse.Namespace) -> None:
    """Reconstruct within a bound, and send what it took."""
    torch.manual_seed(0)
    images = RandomImages(options.images, options.size)
    qmodel = he.prepare(timm.create_model(options.model).eval(), torch.randn(2, 3, options.size, options.size),
                        scheme="w4a8", batchnorm="fold")  # fmt: skip
    he.calibrate(qmodel, images, 2)
    algorithm = {"layers": adaround, "blocks": reconstruct}[options.units]
    ptq = PTQOptions(iterations=options.iterations, batch_size=BATCH, memory=memory)
    before, start = psutil.Process().memory_info().rss, time.perf_counter()
    algorithm(qmodel, images, options=ptq)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    pipe.send({"before_gb": before / 1e9, "added_gb": (peak - before) / 1e9, "seconds": time.perf_counter() - start})


def in_process(memory: float, options: argparse.Namespace) -> dict[str, float]:
    """What `measure` sends, from a process that nothing was done in before."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender, memory, options))
    process.start()
    sender.close()  # so that a process that fails does not leave this one waiting
    result: dict[str, float] = receiver.recv()
    process.join()
    return {name: round(value, 2) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--memory", type=float, nargs="+", default=[1.0, 4.0, float("inf")], help="bounds in GB")
    parser.add_argument("--units", choices=("layers", "blocks"), default="layers")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for memory in options.memory:
        results[f"{memory:g}"] = found = in_process(memory, options)
        print(f"bound {memory:g} GB: {found['added_gb']:.2f} GB more than before, {found['seconds']:.0f} s", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"images": options.images, "units": options.units, **results}, indent=2))


if __name__ == "__main__":
    main()
