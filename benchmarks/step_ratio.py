"""What a QAT step costs: time of a training step over that of the float model's, in interleaved pairs.

    python benchmarks/step_ratio.py [resnet18 mobilenetv2_100] [--size 224] [--batch 8] [--ranges observed] [--pairs 15]

Both steps are forward, backward and an SGD update of the same timm model on the same random batch; the median of the
pairs' ratios is printed. Absolute times are those of a shared machine and mean little.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import nn
from torch.nn import functional as F

import halfeven as he


def stepper(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], float]:
    """A function that takes one training step and returns its seconds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    model.train()

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def ratio(name: str, size: int, batch: int, ranges: str, pairs: int) -> dict[str, float]:
    """Median ratio of interleaved pairs, and its extremes."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    qmodel = he.calibrate(he.prepare(model, images[:2], ranges=ranges), [images])
    floating, quantized = stepper(model, images, labels), stepper(qmodel, images, labels)
    for step in (floating, quantized) * 2:  # the first steps allocate and compile
        step()
    ratios = []
    for _ in range(pairs):
        before = floating()
        ratios.append(quantized() / before)
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["resnet18", "mobilenetv2_100"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--ranges", nargs="+", default=["observed", "learned"])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for name in options.models:
        for ranges in options.ranges:
            found = ratio(name, options.size, options.batch, ranges, options.pairs)
            results[f"{name}, {ranges} ranges"] = found
            print(
                f"{name} {options.size}px b{options.batch}, w8a8, {ranges} ranges: QAT step / float step = "
                f"{found['median']:.2f} ({found['least']:.2f} to {found['most']:.2f})",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
