"""Which activations get 8 bits in a model of 4: orders by several measures, and the accuracy that each order buys.

    python benchmarks/sensitivity.py [--networks mobilenetv2 resnet18 ...] [--scheme w4a4] [--counts 4 8 17]
        --json FILE PATHS

Ranges alone are set (no learned rounding), from the calibration samples, which also rank the tensors. Measures: the
SQNR of the answers with one quantizer on (what most tools do); the divergence of the answers (KL) with one quantizer
on; KL in context, with all quantizers on and one raised; and `he.search` with a budget of as many tensors, whose only
candidate is 8 bits. Each order is judged by the network's metric on its held-out samples. The recovered share is of the
gap between all activations at 4 bits and all at 8. What FILE has is not measured again. PATHS are those of
scored_networks.py.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from scored_networks import NETWORKS, Scored, add_arguments, measured_once
from torch import Tensor, nn

import halfeven as he
from halfeven.diagnosis.exchanged_ranges import planned_quantizers, quantized_alone, switched_on
from halfeven.diagnosis.sensitivity import Sensitivities, divergences, reference_of, sensitivities

Order = list[str]
RANKED = ("mobilenetv2", "resnet18", "vit", "lite0", "minilm")
ORDERS = ("SQNR alone", "KL alone", "KL in context", "search")
ONLY_RANGES: dict[str, Any] = {"reconstruct": "off", "correct_biases": "off"}


def by_context(found: Sensitivities) -> Order:
    """Activations by the KL that the answers gain where one is raised, the largest first."""
    return [tensor.name for tensor in found.tensors if not tensor.weight]


def by_kl_alone(found: Sensitivities) -> Order:
    """Activations by the KL where one alone is quantized, the largest first."""
    rows = [tensor for tensor in found.tensors if not tensor.weight]
    return [tensor.name for tensor in sorted(rows, key=lambda tensor: -(tensor.kl_alone or 0.0))]


def by_sqnr_alone(qmodel: nn.Module, batches: Sequence[Any]) -> Order:
    """Activations by the error of the answers where one alone is quantized, the largest first."""
    reference = reference_of(qmodel, batches)
    tensors = {planned.name: [q] for q, planned in planned_quantizers(qmodel) if not q.weight}
    with quantized_alone(qmodel):
        errors = divergences(qmodel, reference, tensors, switched_on, measure=squared_error)
    return sorted(errors, key=lambda name: -errors[name])


def squared_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The mean squared error of the first output, which orders as its SQNR does."""
    return float((found[0] - expected[0]).square().mean())


def raised(network: Scored, qmodel: nn.Module, names: Order) -> float:
    """The metric where these activations have 8 bits."""
    mixed = copy.deepcopy(qmodel)
    places = {tensor.name: tensor.places[0] for tensor in he.plan_of(qmodel).tensors}
    he.set_rules(mixed, [he.Rule(pattern=places[name], activation_bits=8) for name in names])
    he.calibrate(mixed, network.calibration)
    return metric(network, mixed)


def metric(network: Scored, model: nn.Module) -> float:
    """The mean of the network's metric over its held-out samples."""
    return round(float(network.evaluate(model.eval()).mean()), 3)


def searched(network: Scored, scheme: str, count: int) -> tuple[float, int]:
    """The metric of a search with a budget of tensors, and the number of those that it raised."""
    found = he.search(
        network.model,
        network.calibration,
        scheme=scheme,
        tensors=count,
        candidates=(he.Rule(activation_bits=8),),
        log=None,
    )
    low = int(scheme.partition("a")[2])
    return metric(network, found.qmodel), sum(t.scheme.bits > low for t in he.plan_of(found.qmodel).tensors)


def timed(seconds: dict[str, float], name: str, measure: Callable[[], Any]) -> Any:
    """Return what a function returns, and note the seconds of the processor that it took."""
    start = time.process_time()
    found = measure()
    seconds[name] = round(time.process_time() - start, 1)
    return found


def run(network: Scored, scheme: str, counts: Sequence[int]) -> dict[str, Any]:
    """The metric of each order at each count, with the seconds of each measure."""
    batches = network.calibration
    low = he.quantize(network.model, batches, scheme=scheme, **ONLY_RANGES)
    high = he.quantize(network.model, batches, scheme=f"{scheme.partition('a')[0]}a8", **ONLY_RANGES)
    seconds: dict[str, float] = {}
    error_order = timed(seconds, "SQNR alone", lambda: by_sqnr_alone(low, batches))
    both = timed(seconds, "KL alone and in context", lambda: sensitivities(low, batches))
    orders = {"SQNR alone": error_order, "KL alone": by_kl_alone(both), "KL in context": by_context(both)}
    rows: dict[str, Any] = {"scheme": scheme, "float": metric(network, network.model), "unit": network.unit}
    rows |= {"all low": metric(network, low), "all 8": metric(network, high), "tensors": len(error_order)}
    for name, order in orders.items():
        rows[name] = {str(count): raised(network, low, order[:count]) for count in counts}
    found = {
        str(n): timed(seconds, f"search, {n}", lambda count=n: searched(network, scheme, count))  # type: ignore[misc]
        for n in counts
    }
    rows["search"] = {count: value for count, (value, _) in found.items()}
    rows["raised by the search"] = {count: number for count, (_, number) in found.items()}
    return rows | {"seconds": seconds, "first by KL in context": by_context(both)[:8]}


def recovered(rows: dict[str, Any], name: str, count: str) -> float:
    """Share of the gap between all activations at the low bits and at 8 that an order brings back."""
    return float((rows[name][count] - rows["all low"]) / (rows["all 8"] - rows["all low"]))


def table(found: dict[str, Any]) -> str:
    """Return the shares of the gap as a table for the documentation."""
    lines = [f"| Network, scheme | all low, all 8 | raised | {' | '.join(ORDERS)} |", "|---|---|---|---|---|---|---|"]
    for key, rows in found.items():
        title = f"{key}, {rows['tensors']} activations, {rows['unit']}"
        for count in rows["search"]:
            cells = [f"{rows[name][count]:.2f} ({100 * recovered(rows, name, count):.0f} %)" for name in ORDERS]
            ends = f"{rows['all low']:.2f}, {rows['all 8']:.2f}"
            lines.append(f"| {title} | {ends} | {count} | {' | '.join(cells)} |")
    for name in ORDERS[1:]:
        gains = [
            recovered(rows, name, count) - recovered(rows, "SQNR alone", count)
            for rows in found.values()
            for count in rows["search"]
        ]
        lines.append(f"{name} over SQNR alone: {100 * statistics.median(gains):+.0f} % of the gap in the median")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(RANKED))
    parser.add_argument("--scheme", default="w4a4")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 8, 17])
    parser.add_argument("--json", type=Path, required=True)
    add_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # Each network is made when its turn has come.
    jobs = {
        f"{name}, {options.scheme}": lambda name=name: run(NETWORKS[name](options), options.scheme, options.counts)
        for name in options.networks
    }
    print(table(measured_once(jobs, options.json)))


if __name__ == "__main__":
    main()
