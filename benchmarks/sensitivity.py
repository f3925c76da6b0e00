"""Which activations get 8 bits in a model of 4: orders by several measures, and the accuracy that each order buys.

    python benchmarks/sensitivity.py mobilenetv2_100 WEIGHTS.safetensors [--counts 4 8 17] [--seeds 0] [--json FILE]

The float model is timm's, with in_chans=1 and num_classes=10; its weights come by a path. Ranges alone are set (no
learned rounding), from 512 training images that a seed draws, and 256 of them rank the tensors. Measures: the SQNR of
the logits with one quantizer on (what most tools do); the divergence of the answers (KL) with one quantizer on; KL in
context, with all quantizers on and one raised. Accuracy is that of all 10,000 test images, or of the first --test. The
recovered share is of the gap between all activations at 4 bits and all at 8.
"""

import copy
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from fashion_mnist import arguments, float_model, images_of, top1
from torch import Tensor, nn

import halfeven as he
from halfeven.diagnosis.exchanged_ranges import planned_quantizers, quantized_alone, switched_on
from halfeven.diagnosis.sensitivity import Sensitivities, divergences, reference_of, sensitivities
from halfeven.zoo.datasets import load_datasets
from halfeven.zoo.options import DataOptions

Order = list[str]


def by_context(found: Sensitivities) -> Order:
    """Activations by the KL that the answers gain where one is raised, the largest first."""
    return [tensor.name for tensor in found.tensors if not tensor.weight]


def by_kl_alone(found: Sensitivities) -> Order:
    """Activations by the KL where one alone is quantized, the largest first."""
    rows = [tensor for tensor in found.tensors if not tensor.weight]
    return [tensor.name for tensor in sorted(rows, key=lambda tensor: -(tensor.kl_alone or 0.0))]


def by_sqnr_alone(qmodel: nn.Module, batches: Sequence[Tensor]) -> Order:
    """Activations by the error of the logits where one alone is quantized, the largest first."""
    reference = reference_of(qmodel, batches)
    tensors = {planned.name: [q] for q, planned in planned_quantizers(qmodel) if not q.weight}
    with quantized_alone(qmodel):
        errors = divergences(qmodel, reference, tensors, switched_on, measure=squared_error)
    return sorted(errors, key=lambda name: -errors[name])


def squared_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The mean squared error of the first output, which orders as its SQNR does."""
    return float((found[0] - expected[0]).square().mean())


def raised_top1(qmodel: nn.Module, names: Order, batches: Sequence[Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Top-1 in percent where these activations have 8 bits."""
    mixed = copy.deepcopy(qmodel)
    places = {tensor.name: tensor.places[0] for tensor in he.plan_of(qmodel).tensors}
    he.set_rules(mixed, [he.Rule(pattern=places[name], activation_bits=8) for name in names])
    he.calibrate(mixed, batches)
    return top1(mixed, *test)


def run(model: nn.Module, batches: Sequence[Tensor], test: tuple[Tensor, Tensor], counts: Sequence[int]) -> Any:
    """Top-1 of each order at each count, with the seconds of each measure."""
    only_ranges: dict[str, Any] = {"reconstruct": "off", "correct_biases": "off"}
    low = he.quantize(model, batches, scheme="w4a4", **only_ranges)
    start = time.perf_counter()
    context = sensitivities(low, batches, alone=False)
    seconds = {"KL in context": time.perf_counter() - start}
    start = time.perf_counter()
    error_order = by_sqnr_alone(low, batches)
    seconds["SQNR alone"] = time.perf_counter() - start
    both = sensitivities(low, batches)
    orders = {"SQNR alone": error_order, "KL alone": by_kl_alone(both), "KL in context": by_context(context)}
    high = he.quantize(model, batches, scheme="w4a8", **only_ranges)
    rows = {"all 4": top1(low, *test), "all 8": top1(high, *test), "tensors": len(error_order), "seconds": seconds}
    for name, order in orders.items():
        rows[name] = {count: raised_top1(low, order[:count], batches, test) for count in counts}
    return rows | {"first by KL in context": by_context(context)[:8]}


def recovered(rows: dict[str, Any], name: str, count: int) -> float:
    """Share of the gap between all activations at 4 bits and at 8 that an order brings back."""
    return float((rows[name][count] - rows["all 4"]) / (rows["all 8"] - rows["all 4"]))


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 10, 17])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--test", type=int, default=None, help="test images to take; not given: all")
    options = parser.parse_args()
    test = images_of(load_datasets(DataOptions(source="fashion_mnist", root=options.root)).validation, options.test)
    model = float_model(options.model, options.weights)
    found: list[dict[str, Any]] = []
    for seed in options.seeds:
        data = DataOptions(source="fashion_mnist", root=options.root, calibration_seed=seed)
        batches = images_of(load_datasets(data).calibration)[0].split(64)
        found.append(run(model, batches, test, options.counts))
        print(json.dumps(found[-1]), flush=True)
    for name in ("SQNR alone", "KL alone", "KL in context"):
        for count in options.counts:
            accuracy = statistics.median(rows[name][count] for rows in found)
            share = statistics.median(recovered(rows, name, count) for rows in found)
            print(f"{name:14} {count:3} tensors at 8 bits: {accuracy:6.2f} %, {100 * share:3.0f} % of the gap")
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "runs": found}, indent=2))


if __name__ == "__main__":
    main()
