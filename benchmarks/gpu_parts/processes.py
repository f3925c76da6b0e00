"""Two processes that train together: whether their models stay equal, and the time of a step over float's."""

import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpu_parts.job import Job, network
from gpu_parts.steps import batch_of, prepared, stepper
from halfeven.distributed import differing

STEPS = 10


def run(job: Job) -> bool:
    """Start two processes of this script; return True where their models are equal afterwards."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).parent.parent / "gpu.py"), "--worker", "--device", job.device.type]
    command += ["--small"] if job.small else []
    started: list[subprocess.Popen[str]] = []
    try:
        for rank in range(2):
            own = os.environ | place | {"RANK": str(rank)}
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, env=own, stdout=pipe, stderr=pipe, text=True))
        done = [process.communicate(timeout=max(job.left, 60)) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.communicate()
    rows = [json.loads(line) for line in done[0][0].splitlines() if line.startswith("{")]
    codes = [process.returncode for process in started]
    if any(codes) or not rows:
        last = " ".join(err.strip().splitlines()[-1] for _, err in done if err.strip())
        job.report("two processes", failed=f"exit codes {codes}, {len(rows)} rows: {last}")
        return False
    for found in rows:
        job.report("two processes", **found)
    return not any(found["tensors that differ"] for found in rows)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def work(job: Job) -> None:
    """Train float and quantized models as one of two processes, and print rows as JSON."""
    rank = int(os.environ["RANK"])
    alone = torch.cuda.device_count() < 2
    if job.cuda:
        job.device = torch.device("cuda", 0 if alone else rank)
        torch.cuda.set_device(job.device)
    backend = "nccl" if job.cuda and not alone else "gloo"  # nccl takes one process per GPU
    dist.init_process_group(backend)
    batch, labels = batch_of(job)
    half = len(batch) // 2
    own = batch[rank * half : (rank + 1) * half].to(job.device), labels[rank * half : (rank + 1) * half].to(job.device)
    name = job.networks[0]
    models: list[nn.Module] = [network(job, name), prepared(job, name, batch, "observed")]
    steps = [
        stepper(job, DistributedDataParallel(model.to(job.device), broadcast_buffers=False), *own) for model in models
    ]
    for step in steps * 2:
        step()
    pairs = [(steps[0](), steps[1]()) for _ in range(3 if job.small else STEPS)]
    trained = [name for name in differing(models[1]) if "running_" not in name and "num_batches" not in name]
    if rank == 0:
        ratio = statistics.median(b / a for a, b in pairs)
        print(json.dumps({"network": name, "backend": backend, "ratio": ratio, "tensors that differ": trained}))
    dist.destroy_process_group()
