"""Seconds that halfeven's own steps take in a fresh process: import, capture, quantization, export and verification.

    python benchmarks/tool_seconds.py [mobilenetv2_100 densenet201 ...] [--schemes w8a8 w4a8] [--size 224] [--images 64]
        [--runtimes openvino onnxruntime] [--busy 2] [--json FILE]
    python benchmarks/tool_seconds.py mobilenetv3_large_100 --profile quantize

Each network of timm, with random weights, has a process of its own for each scheme. Seconds are those of the clock, and
behind them those of the processor: the first grow where other processes run, the second where threads wait in a loop.
`--busy 2` runs two processes beside it that only count. `--profile quantize` prints the functions in
which the steps of this name spend their time.
"""

import argparse
import cProfile
import json
import multiprocessing
import platform
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

ENDINGS = {"openvino": ".xml", "onnxruntime": ".onnx"}
SHOWN = 25
"""Functions of a profile."""


class Clock:
    """Seconds of steps by name: (of the clock, of the processor)."""

    def __init__(self, profiled: str) -> None:
        """Profile the steps whose names begin so; "" for none."""
        self.profiled = profiled
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measure the context as a step."""
        profile = cProfile.Profile() if self.profiled and name.startswith(self.profiled) else None
        began = time.perf_counter(), time.process_time()
        with profile or nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - began[0], time.process_time() - began[1]
        if profile:
            pstats.Stats(profile, stream=sys.stderr).sort_stats("cumulative").print_stats(SHOWN)


def work(job: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Take the steps of a job in this process."""
    clock = Clock(job["profile"])
    with clock.step("import"):
        import timm
        import torch

        import halfeven as he
        from halfeven.zoo import datasets  # noqa: F401 (what the command line imports)
    torch.manual_seed(0)
    model = timm.create_model(job["network"]).eval()
    images = torch.randn(job["images"], 3, job["size"], job["size"])
    batches = list(images.split(32))
    with clock.step("capture"):
        he.prepare(model, batches[0][:2])
    for target in job["runtimes"]:
        with clock.step(f"quantize, {target}"):
            qmodel = he.quantize(model, batches, scheme=job["scheme"], target=target)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{ENDINGS[target]}"
            with clock.step(f"export, {target}"):
                he.export(qmodel, path)
            with clock.step(f"verify, {target}"):
                he.verify(qmodel, path, batches[:1])
    return clock.seconds


def count_for_ever() -> None:
    """Keep a thread busy."""
    while True:
        pass


@contextmanager
def busy(number: int) -> Iterator[None]:
    """Keep threads of the machine busy within the context, each by a process of its own."""
    processes = [multiprocessing.Process(target=count_for_ever, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()


def in_process(job: dict[str, Any]) -> dict[str, list[float]]:
    """Run a job in a process of its own."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=["mobilenetv2_100", "mobilenetv3_large_100", "densenet201"])
    parser.add_argument("--schemes", nargs="+", default=["w8a8"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--runtimes", nargs="+", default=list(ENDINGS), choices=list(ENDINGS))
    parser.add_argument("--busy", type=int, default=0, metavar="PROCESSES")
    parser.add_argument("--profile", default="", metavar="STEP")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.job:
        print(json.dumps(work(json.loads(options.job))))
        return
    rows: list[dict[str, Any]] = []
    for network in options.networks:
        for scheme in options.schemes:
            job = {"network": network, "scheme": scheme, "size": options.size, "images": options.images}
            with busy(options.busy):
                seconds = in_process(job | {"runtimes": options.runtimes, "profile": options.profile})
            rows.append(job | {"busy": options.busy, "seconds": seconds})
            for name, (clock, processor) in seconds.items():
                print(f"{network:24} {scheme:6} {name:24} {clock:7.1f} s  {processor:7.1f} s", flush=True)
            if options.json:
                found = {"date": str(date.today()), "machine": platform.machine(), "rows": rows}
                options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
