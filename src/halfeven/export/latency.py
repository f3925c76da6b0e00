"""How long a deployed file takes, beside the same model in float."""

import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import nn

from halfeven.export import openvino
from halfeven.export.exporting import example_of, exported_program
from halfeven.export.runtime import compile_model, read, request_with
from halfeven.quantizer import Mode, set_mode

LATENCY_PAIRS = 12


def latency(qmodel: nn.Module, path: Path, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, float]:
    """Median milliseconds of the float model and of the file on one batch, timed in turn so that drift hits both
    alike."""
    floating = deployed_in_float(qmodel)
    program = exported_program(floating, *example_of(qmodel))
    with tempfile.TemporaryDirectory() as folder:
        float_path = Path(folder) / "float.xml"
        openvino.write(program, [], float_path)
        tensors = [x.cpu() for x in (*inputs[0], *inputs[1].values())]
        requests = {
            "float": request_with(compile_model(read(float_path)), tensors),
            "deployed": request_with(compile_model(read(path)), tensors),
        }
        times: dict[str, list[float]] = {name: [] for name in requests}
        for turn in range(LATENCY_PAIRS + 2):
            for name, request in requests.items():
                start = time.perf_counter()
                request.infer(share_inputs=True, share_outputs=True)  # no copy of either is timed
                if turn >= 2:  # the first runs allocate
                    times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def deployed_in_float(qmodel: nn.Module) -> nn.Module:
    """The float counterpart of a quantized model, for its latency: same layers, no quantizers, BatchNorm left to
    the runtime."""
    model = copy.deepcopy(qmodel).cpu().float().eval()
    set_mode(model, Mode.FLOAT)
    return model
