"""Parity, latency and size of the deployed file on all test images of Fashion-MNIST, after calibration alone.

    python benchmarks/deployment.py resnet18 WEIGHTS.safetensors [--images 10000] [--target onnxruntime] [--json FILE]

The float model is timm's, with in_chans=1 and num_classes=10; its weights come by a path.
"""

import json
import tempfile
from pathlib import Path

import torch
from fashion_mnist import arguments, float_model

import halfeven as he
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--scheme", default="w8a8")
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--target", choices=("openvino", "onnxruntime", "tensorrt"), default="openvino")
    parser.add_argument("--format", choices=(".xml", ".onnx"), help="not given: the target's own")
    options = parser.parse_args()

    datasets = load_datasets(DataOptions(source="fashion_mnist", root=options.root))
    model = float_model(options.model, options.weights)
    calibration = torch.stack([datasets.calibration[i][0] for i in range(len(datasets.calibration))])
    qmodel = he.quantize(model, list(calibration.split(64)), scheme=options.scheme, target=options.target)
    ending = options.format or (".xml" if options.target == "openvino" else ".onnx")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(datasets.validation, range(options.images)), batch_size=32
    )
    with tempfile.TemporaryDirectory() as folder:
        path = he.export(qmodel, Path(folder) / f"model{ending}")
        report = he.verify(qmodel, path, loader, float_model=model)
        sizes = {file.suffix: file.stat().st_size for file in Path(folder).iterdir()}
    floats = 4 * sum(p.numel() for p in model.parameters())
    print(report)
    for suffix, size in sizes.items():
        print(f"  {suffix} / float weights  {size / floats:.3f}")
    if options.json:
        options.json.write_text(json.dumps({**report.to_dict(), "sizes": sizes, "float_size": floats}, indent=2))


if __name__ == "__main__":
    main()
