"""What a QAT step costs: its time over that of the float model's step, and the memory that training adds over float's.

    python benchmarks/step_ratio.py [resnet18 mobilenetv2_100] [--sizes 224x8 32x64] [--ranges observed learned]
        [--pairs 15]
    python benchmarks/step_ratio.py resnet18 --compiled --sizes 224x8
    python benchmarks/step_ratio.py resnet18 --memory --sizes 224x8
    python benchmarks/step_ratio.py resnet18 --processes 2
    python benchmarks/step_ratio.py resnet18 --peers nncf=NNCF_ENV/bin/python torchao=TORCHAO_ENV/bin/python

A step is forward, backward and an SGD update of a timm model on one random batch. Ratios are medians of interleaved
pairs (float, quantized, float, quantized ...) in one process; absolute times are those of a shared machine and mean
little. `--compiled` compares both under torch.compile(fullgraph=True), and says how long the first step of each took.
`--memory` gives the peak of the process's resident memory over five steps less what it was before the first one, each
model in a process of its own. `--processes 2` trains both models in two processes with DistributedDataParallel (gloo),
each with one thread and a batch of its own: beside the ratio of one process with one thread (`OMP_NUM_THREADS=1`), it
shows what communication adds. Peers run the same job under the Python of an environment that has them (and timm).
"""

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import timm
import torch
from peers import PEERS
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn


def by_halfeven(model: nn.Module, images: Tensor, ranges: str) -> nn.Module:
    he = importlib.import_module("halfeven")
    qmodel: nn.Module = he.calibrate(he.prepare(model, images[:2], ranges=ranges), [images])
    return qmodel


def quantized_by(library: str, model: nn.Module, images: Tensor, ranges: str) -> nn.Module:
    """The model at 8 bits, by ours or by another library."""
    return by_halfeven(model, images, ranges) if library == "halfeven" else PEERS[library](model, [images], (8, 8))


def stepper(model: nn.Module, images: Tensor, labels: Tensor, *, compiled: bool = False) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    model.train()
    if distributed.is_initialized():
        model = DistributedDataParallel(model, broadcast_buffers=False)
    run = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(run(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def made(job: dict[str, Any]) -> tuple[nn.Module, Tensor, Tensor]:
    """The float model and a batch. No BatchNorm starts at zero: torchao divides by its factors."""
    torch.manual_seed(0)
    model = timm.create_model(job["model"])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    images = torch.randn(job["batch"], 3, job["size"], job["size"])
    update_bn([images[:2]], model)
    return model, images, torch.randint(1000, (job["batch"],))


def ratio(job: dict[str, Any]) -> dict[str, float]:
    """Median ratio of interleaved pairs, its extremes, and the seconds of the first steps."""
    model, images, labels = made(job)
    qmodel = quantized_by(job["library"], model, images, job["ranges"])
    floating, quantized = (stepper(m, images, labels, compiled=job["compiled"]) for m in (model, qmodel))
    first = {"first float step, s": round(floating(), 1), "first quantized step, s": round(quantized(), 1)}
    for step in (floating, quantized) * 2:  # these allocate
        step()
    ratios = []
    for _ in range(job["pairs"]):
        before = floating()
        ratios.append(quantized() / before)
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios), **first}


def added_memory(job: dict[str, Any]) -> dict[str, float]:
    """MB that five steps add to this process."""
    model, images, labels = made(job)
    if job["library"] != "float":
        model = quantized_by(job["library"], model, images, job["ranges"])
        stepper(model, images[:2], labels[:2])()  # kernels are compiled before the first step that counts
        model.zero_grad()
    step = stepper(model, images, labels)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = resident("VmRSS")
    for _ in range(5):
        step()
    return {"MB": resident("VmHWM") - before}


def resident(name: str) -> float:
    """A figure of this process's memory, in MB."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in status if line.startswith(name))


def in_process(job: dict[str, Any], python: str = sys.executable) -> dict[str, float]:
    """Run a job in a process of its own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job['processes']}"]
    command = [python, *(launcher if job["processes"] > 1 else []), __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def work(job: dict[str, Any]) -> None:
    """Print the result of a job, of which this process may be one of several."""
    several = job["processes"] > 1
    if several:
        distributed.init_process_group("gloo")
    found = added_memory(job) if job["memory"] else ratio(job)
    if not several or distributed.get_rank() == 0:
        print(json.dumps(found))
    if several:
        distributed.destroy_process_group()


def measured(job: dict[str, Any], python: str, *, memory: bool) -> dict[str, float]:
    """The ratio of times, or of memory, of a job."""
    if not memory:
        return in_process(job, python)
    floating, quantized = in_process(job | {"library": "float"}), in_process(job, python)
    return {"median": quantized["MB"] / floating["MB"], "float, MB": floating["MB"], "quantized, MB": quantized["MB"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet18", "mobilenetv2_100"])
    parser.add_argument("--sizes", nargs="+", default=["224x8", "32x64"], metavar="PIXELSxBATCH")
    parser.add_argument("--ranges", nargs="+", default=["observed", "learned"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--peers", nargs="*", default=[], metavar="LIBRARY=PYTHON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        work(json.loads(options.job))
        return
    libraries = {"halfeven": sys.executable, **dict(peer.split("=", 1) for peer in options.peers)}
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    results: dict[str, Any] = {"date": str(date.today()), "machine": machine}
    for name in options.models:
        for size, batch in (map(int, place.split("x")) for place in options.sizes):
            for library, python in libraries.items():
                for ranges in options.ranges:
                    job = {"model": name, "size": size, "batch": batch, "library": library, "ranges": ranges}
                    job |= {"pairs": options.pairs, "compiled": options.compiled, "memory": options.memory}
                    job["processes"] = options.processes
                    found = measured(job, python, memory=options.memory)
                    several = f", {options.processes} processes" if options.processes > 1 else ""
                    row = f"{name} {size}px b{batch}, w8a8, {library}, {ranges} ranges{several}"
                    results[row] = found
                    what = "memory" if options.memory else "step"
                    rest = ", ".join(f"{key} {value:.2f}" for key, value in found.items() if key != "median")
                    print(f"{row}: {what} / float {what} = {found['median']:.2f} ({rest})", flush=True)
                    if options.json:
                        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
