"""The latency of a deployed file and of its layers, beside those of the same model in float."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from halfeven.deployment.deployed import Deployed
from halfeven.deployment.exported_program import example_of, program_of
from halfeven.errors import VerificationError
from halfeven.graph.batches import Inputs, tensors_of
from halfeven.graph.batchnorm import fold
from halfeven.graph.copying import copy_model
from halfeven.graph.labels import remove_loss
from halfeven.graph.torch_private import forgetting_graphs
from halfeven.graph.training_outputs import remove_training_outputs
from halfeven.placement.folded_batchnorm import settle_live
from halfeven.placement.insertion import recorded_inputs
from halfeven.placement.make_plan import regions
from halfeven.placement.tied_weights import tied_parameters, untie
from halfeven.quantization.model_quantizers import set_mode
from halfeven.quantization.quantizer import Mode
from halfeven.runtimes.layer_execution import slowest
from halfeven.runtimes.runtime import DeployedFile, Runtime
from halfeven.temporary import temporary_folder
from halfeven.verification.layer_times import LayerTimes, shortest_times, steady_kernel_times, time_layers

TIMED_PAIRS = 12
"""Runs of each file whose times count."""

NAMED_KERNELS = 3
"""Kernels that a report names."""

CONFIRMATIONS = 2
"""Largest number of further profiles of each file where a layer looks slower in integers than in float: what interrupts
a kernel once does not do so again."""

WARM_UP_PAIRS = 2
"""Runs of each file before, which allocate."""


def latency(qmodel: nn.Module, path: Path, inputs: Inputs, runtime: Runtime, layers: Sequence[str] = ()) -> LayerTimes:
    """Return the median milliseconds of the file on one batch, and of the float model in two precisions.

    They are timed in turn, so that drift hits all alike. The float model is timed in float32, and in the precision that
    the runtime's default session chooses, which is what the file replaces.

    Args:
        qmodel: the model that the file was written from.
        path: the file.
        inputs: the batch.
        runtime: what runs them.
        layers: layers to time by the runtime's own profile, in both files.
    """
    with temporary_folder() as folder:
        floating = runtime.open_file(write_float(qmodel, runtime, folder), ())
        deployed = runtime.open_file(path, ())
        tensors = [x.cpu() for x in tensors_of(inputs)]
        runs = {
            "float32": floating.timed(tensors),
            # `()` asks for the default session; a runtime without settings has no other.
            "float_default": floating.timed(tensors, ()) if floating.settings else floating.timed(tensors),
            "deployed": deployed.timed(tensors),
        }
        times = median_times(runs)
        return _with_layers(LayerTimes(**times, layers=()), deployed, floating, tensors, layers)


def _with_layers(
    times: LayerTimes, deployed: DeployedFile, floating: DeployedFile, tensors: Sequence[Tensor], layers: Sequence[str]
) -> LayerTimes:
    """Return the times with those of layers. A layer counts as slower only if further profiles of both files say so."""
    mine = steady_kernel_times(deployed, tensors, times.deployed)
    others = steady_kernel_times(floating, tensors, times.float32)
    for _ in range(CONFIRMATIONS):
        times = dataclasses.replace(times, layers=time_layers(mine, others, layers))
        if not times.slower():
            break
        mine = shortest_times(mine, deployed.kernel_times(tensors))
        others = shortest_times(others, floating.kernel_times(tensors))
    return dataclasses.replace(times, layers=time_layers(mine, others, layers))


def median_times(runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Return the median milliseconds of functions that are called in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARM_UP_PAIRS + TIMED_PAIRS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= WARM_UP_PAIRS:
                times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def slowest_kernels(path: Path, inputs: Inputs, runtime: Runtime) -> list[str]:
    """Return the kernels that take the longest, with precision and share of the time, by the runtime's own profile."""
    tensors = [x.cpu() for x in tensors_of(inputs)]
    times = runtime.open_file(path, ()).kernel_times(tensors)
    total = sum(time.milliseconds for time in times)
    return [
        f"{time.name or time.kind} ({time.kind}, {time.precision}): {time.milliseconds / total:.0%}"
        for time in slowest(times, NAMED_KERNELS)
        if total
    ]


@forgetting_graphs()
def write_float(qmodel: nn.Module, runtime: Runtime, folder: Path) -> Path:
    """Write the float counterpart of a quantized model; return its path.

    Raises:
        VerificationError: the runtime's format has no form for it.
    """
    floating = Deployed(_fold_batchnorms(deployed_in_float(qmodel)), [], runtime.target)
    # The runtime's usual format is the first.
    ending, write = next(iter(runtime.writers.items()))
    path = folder / f"float{ending}"
    try:
        write(program_of(floating.model, example_of(qmodel), recorded_inputs(qmodel)), floating, path)
    except Exception as error:  # tracers and converters raise many kinds
        raise VerificationError(
            f"The float model could not be written, so there is nothing to time the file against: {error}\nCompare "
            "without latencies: timed=False, or --export.timed false."
        ) from error
    return path


def deployed_in_float(qmodel: nn.Module) -> nn.Module:
    """Return the float counterpart of a quantized model: the same layers without quantizers."""
    model = copy_model(qmodel).cpu().float().eval()
    for region in regions(model).values():
        remove_loss(region)
        remove_training_outputs(region)
    set_mode(model, Mode.FLOAT)
    return model


def _fold_batchnorms(model: nn.Module) -> nn.Module:
    """Fold the BatchNorms of a float model into its layers, in place; return it.

    ONNX Runtime folds none that the exporter wrote for a free batch, and users do not deploy those.
    """
    untie(model, tied_parameters(model))  # another reader of a layer's weight keeps it as it is
    for region in regions(model).values():
        settle_live(region)
        fold(region)
    return model
