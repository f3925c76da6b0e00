"""Mixed precision within a drop of accuracy: halfeven's search beside NNCF's `quantize_with_accuracy_control`.

    python benchmarks/accuracy_control.py [--networks keywords mobilenetv3 ...] --json FILE [--cost auto latency] PATHS
    NNCF_ENV/bin/python benchmarks/accuracy_control.py ...

Both start from 8 bits, calibrate on the same samples, and leave layers in float until the metric of the same held-out
samples has lost at most --max-drop. Both files run in OpenVINO on one thread: the drop of the file, the layers whose
kernels compute in float, the processor's time for a sample over the float file's in float32 and in the runtime's
default precision (interleaved, with the interval that holds half of the rounds), and the seconds of the search, of the
processor and of the clock. Without NNCF only halfeven's rows are measured. What FILE has is not measured again; a row
is removed from it to be measured anew. PATHS are those of scored_networks.py.
"""

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scored_networks import NETWORKS, Scored, add_arguments, measured_once, tensors_in
from torch import Tensor, nn

import halfeven as he
from halfeven.mixed_precision.result import SearchResult
from halfeven.runtimes.openvino import session
from halfeven.runtimes.runtime import runtime_named
from halfeven.temporary import temporary_folder

COMPARED = ("keywords", "mobilenetv3", "minilm", "rt_detr", "lite0_per_tensor")
DROPS = {"mobilenetv3": 0.5, "minilm": 0.2, "rt_detr": 0.5}
"""Network -> largest drop in the unit of its metric; else 1.0."""
PRECISIONS: dict[str, dict[str, str]] = {"float32": session.SETTINGS, "default": {}}
ONE_THREAD = {"INFERENCE_NUM_THREADS": "1"}
LEAST_SECONDS, MOST_ROUNDS = 5.0, 3000
"""Time that the rounds of small networks fill, whose single runs say little."""
LAYER_KINDS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention")


class Positional(nn.Module):
    """Take the inputs by position and return the outputs as a tuple, which converters keep in order."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_in(self.model(**dict(zip(self.names, inputs, strict=True)))))


def write_float(network: Scored, path: Path) -> Any:
    """Write the float model as OpenVINO converts it, for one sample at a time where it has no free batch; return it."""
    import openvino

    inputs = tuple(x[:2] for x in network.calibration[0].values())
    model = Positional(network.model, list(network.inputs))
    free = (tuple({0: torch.export.Dim("batch")} for _ in inputs),)
    try:
        program = torch.export.export(model, inputs, dynamic_shapes=free)
    except torch._dynamo.exc.UserError:  # the model computes with the number of samples
        program = torch.export.export(model, tuple(x[:1] for x in inputs))
    converted = openvino.convert_model(program)
    openvino.save_model(converted, path, compress_to_fp16=False)
    return converted


@dataclass(frozen=True)
class Stopwatch:
    """Seconds of the processor and of the clock since it was made."""

    processor: float
    clock: float
    limit: float

    def check(self) -> None:
        """Stop a search that has taken longer than the limit."""
        if time.process_time() - self.processor > self.limit:
            raise TimeoutError(f"not finished after {self.limit:g} s of the processor")

    def read(self) -> dict[str, float]:
        return {
            "processor seconds": round(time.process_time() - self.processor, 1),
            "seconds": round(time.perf_counter() - self.clock, 1),
        }


def started(limit: float) -> Stopwatch:
    return Stopwatch(time.process_time(), time.perf_counter(), limit)


# ----------------------------------------------------------------------------------------------------- the two searches


def by_halfeven(network: Scored, max_drop: float, path: Path, cost: str, watch: Stopwatch) -> dict[str, Any]:
    """Search with halfeven, write the file, and return the row of the search."""

    def log(text: str) -> None:
        print(text, flush=True)
        watch.check()

    found: SearchResult = he.search(
        network.model,
        network.calibration,
        network.evaluate,
        max_drop=max_drop,
        cost=cost,  # type: ignore[arg-type]
        scheme="w8a8",
        target="openvino",
        per_channel=network.per_channel,
        log=log,
    )
    he.export(found.qmodel, path)
    row = watch.read()
    print(found, flush=True)
    first = found.steps[0].judgement
    return {"steps": found.chosen, "drop of int8": first and round(first.drop, 3), **row}


def by_nncf(network: Scored, max_drop: float, path: Path, floating: Any, watch: Stopwatch) -> dict[str, Any]:
    """Search with NNCF from the float file, write the file, and return the row of the search."""
    import nncf
    import openvino
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    metrics: list[float] = []

    def validated(compiled: Any, items: Iterable[Any]) -> tuple[float, list[float]]:
        watch.check()
        values = [_value(network, compiled, arrays, index) for arrays, index in items]
        if len(values) == len(judged):  # not those that find out what this function returns, or rank
            metrics.append(statistics.fmean(values))
        return statistics.fmean(values), values

    samples = [x for batch in network.calibration for x in _singles(batch)]
    judged = list(zip(_singles(network.inputs), range(len(network.targets[0])), strict=True))
    coarse = AdvancedQuantizationParameters(weights_quantization_params=QuantizationParameters(per_channel=False))
    found = nncf.quantize_with_accuracy_control(
        floating,
        nncf.Dataset(samples),
        nncf.Dataset(judged, lambda item: item[0]),
        validated,
        max_drop=max_drop,
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if network.transformer else None,
        advanced_quantization_parameters=None if network.per_channel else coarse,
    )
    openvino.save_model(found, path, compress_to_fp16=False)
    row = watch.read()
    return {"drop of int8": round(metrics[0] - metrics[1], 3), **row}


def _singles(batch: dict[str, Tensor]) -> list[list[np.ndarray[Any, Any]]]:
    """Return the samples of a batch one by one, each as the arrays of its inputs."""
    count = len(next(iter(batch.values())))
    return [[x[i : i + 1].numpy() for x in batch.values()] for i in range(count)]


def _value(network: Scored, compiled: Any, arrays: list[np.ndarray[Any, Any]], index: int) -> float:
    results = compiled(arrays)
    outputs = [torch.from_numpy(results[i]) for i in range(len(compiled.outputs))]
    return float(network.score(outputs, [target[index : index + 1] for target in network.targets]))


# -------------------------------------------------------------------------------------------------------- the two files


def drop_of(network: Scored, path: Path, expected: Tensor, settings: dict[str, str]) -> dict[str, float]:
    """Return the drop of a file's metric from the float model's, with half of its 95 % interval."""
    compiled = session.compile_model(session.read(path), {**settings, **ONE_THREAD})

    def model(**inputs: Tensor) -> list[Tensor]:
        # One by one: NNCF's file has no free batch where the float file has none.
        results = [
            session.run_compiled(compiled, one) for one in zip(*(x.split(1) for x in inputs.values()), strict=True)
        ]
        return [torch.cat(parts) for parts in zip(*results, strict=True)]

    lost = expected - network.evaluate(model)
    return {"drop": round(float(lost.mean()), 3), "interval": round(1.96 * float(lost.std()) / len(lost) ** 0.5, 3)}


def layers_of(path: Path, inputs: Sequence[Tensor]) -> dict[str, int]:
    """Return the number of layers and products that the runtime computes, and of those in float."""
    times = runtime_named("openvino").open_file(path, ()).kernel_times(list(inputs))
    layers = [kernel for kernel in times if kernel.kind in LAYER_KINDS]
    return {"layers": len(layers), "in float": sum(not kernel.integer for kernel in layers)}


def latencies(files: dict[str, Path], inputs: Sequence[Tensor], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the time of each file over the float file's in the same precision: the quartiles of the rounds."""
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for precision, settings in PRECISIONS.items():
        for name, path in files.items():
            compiled = session.compile_model(session.read(path), {**settings, **ONE_THREAD})
            runs[name, precision] = session.request_with(compiled, inputs).infer
    times = processor_times(runs, rounds)
    return {
        name: {precision: _quartiles(times[name, precision], times["float", precision]) for precision in PRECISIONS}
        for name in files
        if name != "float"
    }


def processor_times(runs: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, list[float]]:
    """Return the seconds of the processor that each function takes in each round, of which short functions have more.

    On a machine that is shared, the clock counts other work too.
    """
    times: dict[Any, list[float]] = {name: [] for name in runs}
    begun = time.process_time()
    for turn in range(2 + MOST_ROUNDS):
        if turn >= 2 + rounds and time.process_time() - begun > LEAST_SECONDS:
            break
        for name, run in runs.items():
            start = time.process_time()
            run()
            if turn >= 2:
                times[name].append(time.process_time() - start)
    return times


def _quartiles(own: Sequence[float], others: Sequence[float]) -> list[float]:
    return [round(q, 3) for q in statistics.quantiles([a / b for a, b in zip(own, others, strict=True)], n=4)]


# --------------------------------------------------------------------------------------------------------------- report


def tried(search: Callable[..., dict[str, Any]], network: Scored, max_drop: float, path: Path, *given: Any) -> Any:
    """Return the row of a search with its file, or the reason why it has none: the others are of use without it."""
    try:
        return {**search(network, max_drop, path, *given), "file": path}
    except Exception as error:  # libraries raise what they like
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return all rows of a network."""
    network = NETWORKS[name](options)
    expected = network.evaluate(network.model)
    max_drop = options.max_drop if options.max_drop is not None else DROPS.get(name, 1.0)
    rows: dict[str, Any] = {}
    with temporary_folder() as folder:
        files = {"float": folder / "float.xml"}
        floating = write_float(network, files["float"])
        for cost in options.cost:
            file = folder / f"{cost}.xml"
            rows[f"halfeven, {cost}"] = tried(by_halfeven, network, max_drop, file, cost, started(options.limit))
        if importlib.util.find_spec("nncf") is not None and not options.no_nncf:
            file = folder / "nncf.xml"
            rows["NNCF"] = tried(by_nncf, network, max_drop, file, floating, started(options.limit))
        made = {method: row.pop("file") for method, row in rows.items() if "file" in row}
        files = {"float": files["float"], **made}
        one = [x[:1] for x in network.inputs.values()]
        ratios = latencies(files, one, options.rounds)
        for method in made:
            row = rows[method]
            row |= drop_of(network, files[method], expected, PRECISIONS["float32"])
            row["drop in default precision"] = drop_of(network, files[method], expected, {})["drop"]
            row |= layers_of(files[method], one) | {"over float": ratios[method]}
    return {"metric": network.unit, "float": round(float(expected.mean()), 2), "max_drop": max_drop, "rows": rows}


def table(found: dict[str, Any]) -> str:
    """Return all rows as a table for the documentation."""
    lines = [
        "| Network, metric | | int8 alone | Drop | Layers in float | Over float32 | Over default float | Search, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, network in found.items():
        title = f"{name}, {network['metric']} {network['float']:.2f}, budget {network['max_drop']:g}"
        for method, row in network["rows"].items():
            if "failed" in row:
                lines.append(f"| {title} | {method} | {row['failed']} | | | | | |")
                title = ""
                continue
            ratios = [f"{m:.2f} ({a:.2f}-{b:.2f})" for a, m, b in row["over float"].values()]
            cells = [title, method, f"{row['drop of int8']:.2f}", f"{row['drop']:.2f} ± {row['interval']:.2f}"]
            cells += [f"{row['in float']} of {row['layers']}", *ratios, f"{row['processor seconds']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
            title = ""
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(COMPARED))
    parser.add_argument("--max-drop", type=float, help="in the metric's unit; not given: the network's own")
    parser.add_argument("--cost", nargs="+", default=["auto"], help="of halfeven's search: auto, latency, bops, size")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds of the processor for a search")
    parser.add_argument("--no-nncf", action="store_true")
    parser.add_argument("--json", type=Path, required=True)
    add_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    jobs = {name: partial(measured, name, options) for name in options.networks}
    print(table(measured_once(jobs, options.json)))


if __name__ == "__main__":
    main()
