"""What equalization, absorption and analytic correction do for a model, with calibrated ranges and with none.

    python benchmarks/equalization.py mobilenetv2_100 WEIGHTS.safetensors [--scheme w8a8] [--per-channel] [--json FILE]

The float model is timm's, with in_chans=1 and num_classes=10; its weights come by a path. Fashion-MNIST: 512 training
images for calibration and data-driven absorption, the test images for accuracy. Weights have one scale per tensor
unless --per-channel. "float" is the model with all quantizers off, before its biases are corrected.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from fashion_mnist import images_of, top1
from safetensors.torch import load_file
from torch import Tensor, nn

import halfeven as he
from halfeven.layerwise.float_equivalence import float_function
from halfeven.ptq.data_free.calibrate import correct_biases_analytically, ranges_from_batchnorm
from halfeven.ptq.equalization.bias_absorption import absorb_biases
from halfeven.ptq.equalization.cross_layer import equalize, unclip_relu6, unclipping_sqnr
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions

Step = Callable[[nn.Module], Any]


def rows(calibration: list[Tensor] | None) -> dict[str, list[Step]]:
    """The steps of each row of the table."""

    def absorb(qmodel: nn.Module) -> Any:
        return absorb_biases(qmodel, calibration)

    def absorb_everywhere(qmodel: nn.Module) -> Any:
        return absorb_biases(qmodel, calibration, across_padding=True)

    return {
        "ranges alone": [],
        "correction": [correct_biases_analytically],
        "equalization, ReLU6 kept": [equalize],
        "equalization, ReLU": [unclip_relu6, equalize],
        "equalization, absorption": [unclip_relu6, equalize, absorb],
        "the same, across padding": [unclip_relu6, equalize, absorb_everywhere],
        "equalization, absorption, correction": [unclip_relu6, equalize, absorb, correct_biases_analytically],
    }


def measured(
    qmodel: nn.Module, steps: list[Step], calibration: list[Tensor] | None, test: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Top-1 after the steps: of the float function, and quantized."""
    for step in steps:
        if step is not correct_biases_analytically:
            step(qmodel)
    with float_function(qmodel):
        kept = top1(qmodel, *test)
    if correct_biases_analytically in steps:
        correct_biases_analytically(qmodel)
    if calibration:
        he.calibrate(qmodel, calibration)
    else:
        ranges_from_batchnorm(qmodel)
    return {"float": kept, "quantized": top1(qmodel, *test)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="timm's name of the float model")
    parser.add_argument("weights", type=Path, help="its .safetensors")
    parser.add_argument("--root", default="", help="folder of the IDX files; not given: Debian's")
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--per-channel", action="store_true")
    parser.add_argument("--data", choices=["yes", "no", "both"], default="both")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    datasets = load_datasets(DataOptions(source="fashion_mnist", root=options.root))
    test, (training, _) = images_of(datasets.validation, options.images), images_of(datasets.train, 512)
    model = timm.create_model(options.model, in_chans=1, num_classes=10)
    model.load_state_dict(load_file(options.weights))
    results: dict[str, Any] = {"float": top1(model, *test)}
    print(f"float {results['float']:.2f}")
    for data in [choice for choice in ("yes", "no") if options.data in (choice, "both")]:
        calibration = list(training.split(64)) if data == "yes" else None
        for name, steps in rows(calibration).items():
            qmodel = he.prepare(
                model.eval(), training[:2], scheme=options.scheme, per_channel=options.per_channel, batchnorm="fold"
            )
            if not steps:
                print("least SQNR of a ReLU6 made ReLU:", min(unclipping_sqnr(qmodel).values(), default=None))
            found = measured(qmodel, steps, calibration, test)
            results[f"{name}, data {data}"] = found
            print(f"{name:38s} data {data:3s}  " + "  ".join(f"{k} {v:.2f}" for k, v in found.items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
