"""Accuracy of post-training quantization on Fashion-MNIST: the defaults, and ranges alone, over schemes and seeds.

    python benchmarks/ptq.py resnet18 WEIGHTS.safetensors [--schemes w8a8 w4a8 w4a4] [--seeds 0 1 2] [--json FILE]

The float model is timm's, with in_chans=1 and num_classes=10; its weights come by a path. A seed draws 512 training
images, which are all that quantization sees; every layer is quantized. Accuracy is that of all 10,000 test images, and
the seconds are those of `halfeven.quantize`, capture included.
"""

import json
import statistics
import time
from typing import Any

from fashion_mnist import arguments, float_model, images_of, top1
from torch import Tensor, nn

import halfeven as he
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "ranges only": {"reconstruct": "off", "correct_biases": "off"},
}


def quantized(
    model: nn.Module, images: Tensor, test: tuple[Tensor, Tensor], options: dict[str, Any]
) -> dict[str, float]:
    """Top-1 in percent and the seconds that it took."""
    start = time.perf_counter()
    qmodel = he.quantize(model, images.split(64), **options)
    seconds = time.perf_counter() - start
    return {"top1": top1(qmodel, *test), "seconds": round(seconds, 1)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a8", "w4a4"])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()

    test = images_of(load_datasets(DataOptions(source="fashion_mnist", root=options.root)).validation)
    model = float_model(options.model, options.weights)
    print(f"{options.model}: float {top1(model, *test):.2f}", flush=True)
    rows: dict[str, list[dict[str, float]]] = {}
    for scheme in options.schemes:
        for setting in options.settings:
            runs = rows.setdefault(f"{scheme} {setting}", [])
            for seed in options.seeds:
                data = DataOptions(source="fashion_mnist", root=options.root, calibration_seed=seed)
                images = images_of(load_datasets(data).calibration)[0]
                runs.append(quantized(model, images, test, {"scheme": scheme, **SETTINGS[setting]}))
            accuracy, seconds = ([run[key] for run in runs] for key in ("top1", "seconds"))
            print(f"{scheme} {setting:12} {statistics.median(accuracy):6.2f}  {accuracy}  {seconds} s", flush=True)
            if options.json:
                options.json.write_text(json.dumps({"model": options.model, "runs": rows}, indent=2))


if __name__ == "__main__":
    main()
