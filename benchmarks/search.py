"""Search a mixed-precision plan for a model of 4 bits: at most 10 activations get more, ranges alone are set.

    python benchmarks/search.py mobilenetv2_100 WEIGHTS.safetensors [--tensors 10] [--seeds 0 1 2] [--json FILE]

The float model is timm's, with in_chans=1 and num_classes=10; its weights come by a path. Each seed draws other
training images for calibration (512). Accuracy is that of all 10,000 test images, or of the first --test. The search
gets no label and no test image.
"""

import json
import statistics
import time
from typing import Any

from fashion_mnist import arguments, float_model, images_of, top1

import halfeven as he
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--tensors", type=int, default=10)
    parser.add_argument("--observers", nargs="*", default=["lp"], help="observers to try at the scheme's bits")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--rescorings", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test", type=int, default=None, help="test images to take; not given: all")
    options = parser.parse_args()
    test = images_of(load_datasets(DataOptions(source="fashion_mnist", root=options.root)).validation, options.test)
    model = float_model(options.model, options.weights)
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        data = DataOptions(source="fashion_mnist", root=options.root, calibration_seed=seed)
        batches = images_of(load_datasets(data).calibration)[0].split(64)
        start = time.perf_counter()
        found = he.search(
            model,
            batches,
            scheme=options.scheme,
            tensors=options.tensors,
            candidates=(he.Rule(activation_bits=8), *(he.Rule(observer=name) for name in options.observers)),
            samples=options.samples,
            rescorings=options.rescorings,
        )
        seconds = time.perf_counter() - start
        raised = sum(tensor.scheme.bits > 4 for tensor in he.plan_of(found.qmodel).tensors)
        rows.append({"seed": seed, "raised": raised, "seconds": seconds, "top1": top1(found.qmodel, *test)})
        rows[-1]["names"] = [rule.pattern for rule in found.rules]
        print(json.dumps(rows[-1]), flush=True)
    print(
        f"{options.model} {options.scheme}, at most {options.tensors} activations raised, median of {len(rows)}: "
        f"top-1 {statistics.median(row['top1'] for row in rows):.2f} %, search "
        f"{statistics.median(row['seconds'] for row in rows):.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "runs": rows}, indent=2))


if __name__ == "__main__":
    main()
