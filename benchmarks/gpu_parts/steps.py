"""Training steps on the device: time and memory of the quantized model over those of the float model."""

import functools
import gc
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfeven as he
from gpu_parts.job import Job, classes, images, network

PAIRS = 15
"""Steps of each model whose times count, where there is time."""

SECONDS_OF_A_RATIO = 75.0
"""Least time that is left before a ratio is begun; with whole-model compilation twice as much."""


def prepared(job: Job, name: str, batch: Tensor, ranges: str) -> nn.Module:
    qmodel: nn.Module = he.calibrate(he.prepare(network(job, name), batch[:2], ranges=ranges), [batch[:8]])
    return qmodel


def stepper(
    job: Job, model: nn.Module, batch: Tensor, labels: Tensor, *, compiled: bool = False
) -> Callable[[], float]:
    """Return a function that takes one training step under bfloat16 autocast, and returns its seconds."""
    model = model.to(job.device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    run = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> float:
        job.wait()
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(job.device.type, torch.bfloat16):
            loss = F.cross_entropy(run(batch), labels)
        loss.backward()
        optimizer.step()
        job.wait()
        return time.perf_counter() - start

    return step


def batch_of(job: Job) -> tuple[Tensor, Tensor]:
    size = 4 if job.small else 64
    labels = torch.randint(classes(job), (size,), generator=torch.Generator().manual_seed(3))
    return images(job, size), labels


def ratios(job: Job, *, compiled: bool) -> bool:
    """Report step time over float step time, of interleaved pairs; return True, since there is nothing to agree."""
    batch, labels = batch_of(job)
    part = "step, compiled" if compiled else "step"
    for name in job.networks:
        for ranges in ("observed", "learned"):
            if job.left < SECONDS_OF_A_RATIO * (1 + compiled) and not job.small:
                job.report(part, network=name, ranges=ranges, skipped="no time was left")
                continue
            models = network(job, name), prepared(job, name, batch, ranges)
            here = batch.to(job.device), labels.to(job.device)
            floating, quantized = (stepper(job, model, *here, compiled=compiled) for model in models)
            first = [step() for step in (floating, quantized)]
            for step in (floating, quantized) * 2:
                step()
            found = []
            while len(found) < (3 if job.small else PAIRS) and (job.left > 5 or not found):
                found.append((floating(), quantized()))
            pairs = [b / a for a, b in found]
            job.report(
                part,
                network=name,
                ranges=ranges,
                ratio=statistics.median(pairs),
                least=min(pairs),
                most=max(pairs),
                **{"float ms": 1000 * statistics.median(a for a, _ in found)},
                **{"first steps, s": " and ".join(f"{seconds:.1f}" for seconds in first)},
            )
            del models, floating, quantized, step
            _free(job)
    return True


def _free(job: Job) -> None:
    """Give back the memory of models that are no longer used; graphs hold themselves in cycles."""
    gc.collect()
    if job.cuda:
        torch.cuda.empty_cache()


def memory(job: Job) -> bool:
    """Report the peak memory of a step over the float model's, as CUDA counts it."""
    if not job.cuda:
        job.report("memory", skipped="only CUDA counts it; benchmarks/step_ratio.py --memory measures a CPU")
        return True
    batch, labels = batch_of(job)
    for name in job.networks:
        peaks = []
        makers = functools.partial(network, job, name), functools.partial(prepared, job, name, batch, "learned")
        for make in makers:  # one model at a time: the other would count in its memory
            step = stepper(job, make(), batch.to(job.device), labels.to(job.device))
            step()
            torch.cuda.reset_peak_memory_stats(job.device)
            step()
            peaks.append(torch.cuda.max_memory_allocated(job.device) / 1e6)
            del step
            _free(job)
        job.report("memory", network=name, ratio=peaks[1] / peaks[0], **{"float MB": peaks[0]})
    return True
