"""One file for all sizes: integers at each size, and latency beside a file of that size alone.

    python benchmarks/free_sizes.py [text detector unet] [--scheme w7a8] [--pairs 9] [--json FILE]

For each model and runtime, one file with free axes is verified at every size. Then it is timed in turn with the file of
a model that was prepared at that size, on one thread at batch 1: medians of the pairs' ratios, with their smallest and
largest. Weights are random.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfeven as he

RUNS = 30
"""Runs of one file in a row, whose fastest counts for the pair."""


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class TextEncoder(nn.Module):
    """Two transformer layers of width 128 with learned positions, as small sentence encoders have them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(1000, 128)
        self.positions = nn.Embedding(512, 128)
        self.norm = nn.LayerNorm(128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(128, 8)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device)
        y = self.norm(self.words(ids) + self.positions(places))
        y = self.layers(y, src_key_padding_mask=mask == 0)
        return {"tokens": y, "logits": self.head(y[:, 0])}


class Detector(nn.Module):
    """A one-stage detector of three levels with a feature pyramid, its boxes decoded inside."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, 16, 2), block(16, 32, 2))
        self.c3, self.c4, self.c5 = block(32, 64, 2), block(64, 64, 2), block(64, 64, 2)
        self.up = nn.ModuleList(block(128, 64) for _ in range(2))
        self.boxes, self.scores = nn.Conv2d(64, 4, 1), nn.Conv2d(64, 8, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        c3 = self.c3(self.stem(images))
        c4 = self.c4(c3)
        p5 = self.c5(c4)
        p4 = self.up[0](torch.cat([c4, F.interpolate(p5, size=c4.shape[2:])], 1))
        p3 = self.up[1](torch.cat([c3, F.interpolate(p4, size=c3.shape[2:])], 1))
        levels = list(zip((p3, p4, p5), (8, 16, 32), strict=True))
        boxes = torch.cat([self.boxes(p).flatten(2) * stride for p, stride in levels], 2)
        scores = torch.cat([self.scores(p).flatten(2) for p, _ in levels], 2)
        return {"boxes": boxes.transpose(1, 2), "scores": scores.transpose(1, 2).sigmoid()}


class UNet(nn.Module):
    """Three levels, which are resized to their skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([block(3, 16), block(16, 32), block(32, 64)])
        self.up = nn.ModuleList([block(96, 32), block(48, 16)])
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        a = self.down[0](images)
        b = self.down[1](F.max_pool2d(a, 2))
        c = self.down[2](F.max_pool2d(b, 2))
        y = self.up[0](torch.cat([b, F.interpolate(c, size=b.shape[2:], mode="bilinear")], 1))
        y = self.up[1](torch.cat([a, F.interpolate(y, size=a.shape[2:], mode="bilinear")], 1))
        return self.head(y)


@dataclass(frozen=True)
class Subject:
    """A model, its free axes, sizes, and inputs of a size and number of samples."""

    model: Callable[[], nn.Module]
    dynamic_shapes: dict[str, dict[int, str]]
    sizes: tuple[int, ...]
    example: int
    inputs: Callable[[int, int], Any]


def texts(length: int, samples: int) -> dict[str, Tensor]:
    """Return padded texts of up to `length` tokens."""
    lengths = torch.randint(max(1, length // 2), length + 1, (samples, 1))
    return {
        "ids": torch.randint(1, 1000, (samples, length)),
        "mask": (torch.arange(length) < lengths).long(),
    }


def images(size: int, samples: int) -> Tensor:
    return torch.randn(samples, 3, size, size)


SIDES = {"images": {2: "height", 3: "width"}}
SUBJECTS = {
    "text": Subject(
        TextEncoder, {name: {1: "tokens"} for name in ("ids", "mask")}, (8, 31, 64, 128, 300, 512), 64, texts
    ),
    "detector": Subject(Detector, SIDES, (96, 160, 224, 320), 160, images),
    "unet": Subject(UNet, SIDES, (96, 131, 224, 320), 160, images),
}
TARGETS = {"openvino": ".xml", "onnxruntime": ".onnx"}


def quantized(subject: Subject, model: nn.Module, sizes: tuple[int, ...], **options: Any) -> nn.Module:
    torch.manual_seed(1)
    batches = [subject.inputs(size, 4) for size in sizes]
    return he.quantize(model, batches, example=batches[0], **options)


def measure(subject: Subject, target: str, scheme: str, pairs: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    model = subject.model().eval()
    free = quantized(
        subject,
        model,
        (subject.example, subject.sizes[0], subject.sizes[-1]),
        scheme=scheme,
        target=target,
        dynamic_shapes=subject.dynamic_shapes,
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = he.export(free, Path(folder) / f"free{TARGETS[target]}")
        for size in subject.sizes:
            batch = subject.inputs(size, 2)
            report = he.verify(free, path, [batch], timed=False)
            fixed = quantized(subject, model, (size,), scheme=scheme, target=target)
            fixed_path = he.export(fixed, Path(folder) / f"fixed_{size}{TARGETS[target]}")
            ratios = latency_ratios(path, fixed_path, subject.inputs(size, 1), pairs)
            rows.append(
                {
                    "size": size,
                    "integers equal": report.integer_match,
                    "layers alone": report.alone_match,
                    "output difference": report.output_difference,
                    "integer layers": f"{report.integer_layers}/{report.quantizable_layers}",
                    "ratio": statistics.median(ratios),
                    "ratios": [min(ratios), max(ratios)],
                }
            )
    return rows


def latency_ratios(free: Path, fixed: Path, inputs: Any, pairs: int) -> list[float]:
    """Return the ratio of both files' latencies for each pair of runs, which alternate in their order."""
    files = [runner(path, inputs) for path in (free, fixed)]
    ratios = []
    for turn in range(pairs + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        times = {index: fastest(files[index]) for index in order}
        if turn:  # the first pair allocates
            ratios.append(times[0] / times[1])
    return ratios


def fastest(run: Callable[[], object]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def runner(path: Path, inputs: Any) -> Callable[[], object]:
    """Return a function that computes a file on one thread and does nothing else."""
    arrays = [x.numpy() for x in (inputs.values() if isinstance(inputs, dict) else [inputs])]
    if path.suffix == ".xml":
        import openvino

        settings = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_NUM_THREADS": 1}
        request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
        return lambda: request.infer(arrays, share_inputs=True, share_outputs=True)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {known.name: array for known, array in zip(session.get_inputs(), arrays, strict=True)}
    return lambda: session.run(None, feed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", default=list(SUBJECTS))
    parser.add_argument("--scheme", default="w7a8")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in options.subjects:
        for target in TARGETS:
            rows = found[f"{name}, {target}"] = measure(SUBJECTS[name], target, options.scheme, options.pairs)
            print(f"{name}, {target}", flush=True)
            for row in rows:
                low, high = row["ratios"]
                print(
                    f"  {row['size']:4}  integers equal {100 * row['integers equal']:.4f} %  layers alone "
                    f"{100 * row['layers alone']:.4f} %  output {row['output difference']:.1e}  in integers "
                    f"{row['integer layers']}  free / fixed {row['ratio']:.3f} ({low:.3f} to {high:.3f})",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
